"""Many runs as one experiment: what a study is, its kinds, one a file, and the engine that runs them."""

from mtjax.studies.curation import curation
from mtjax.studies.efficiency import efficiency
from mtjax.studies.mixing import mixing
from mtjax.studies.ratio import ratio
from mtjax.studies.runs import study
from mtjax.studies.scaling import scaling
from mtjax.studies.stages import stages
from mtjax.studies.transfer import transfer

__all__ = ["curation", "efficiency", "mixing", "ratio", "scaling", "stages", "study", "transfer"]
