"""What comes before `train.fit` in a run: the mixture in the cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from mtjax.data import cache
from mtjax.data import vocabulary as vocabularies


def mixture(
    name: str,
    *,
    cache_dirs: Sequence[str],
    module: str | Sequence[str] | None = None,
    modules: Sequence[str] = (),
    vocabulary: str | None = None,
    tfds_data_dir: str | None = None,
    use_cached_tasks: bool = False,
) -> None:
    """Cache a mixture in the first of cache_dirs unless one of them holds it.

    `module` and `modules` register its SeqIO tasks; they are imported, with TensorFlow, only to cache, in a
    process of its own. With use_cached_tasks a missing cache is an error instead. What is cached is used as
    it is: `mtjax cache` finds out which tasks have changed since. Raises ValueError too where the cached tasks
    have another vocabulary than the one asked for.
    """
    try:
        cached = cache.open_mixture(cache_dirs, name)
    except ValueError:
        if use_cached_tasks:
            raise
    else:
        check_vocabulary(cached, vocabulary)
        return
    listed = [module] if isinstance(module, str) else list(module or ())
    command = [sys.executable, "-m", "mtjax.launch.main", "cache", f"--mixture={name}"]
    command += [f"--cache_dir={cache_dirs[0]}"]
    command += [f"--module={item}" for item in [*listed, *modules]]
    command += [f"--seqio_additional_cache_dirs={folder}" for folder in cache_dirs[1:]]
    command += [f"--vocabulary={vocabulary}"] if vocabulary else []
    command += [f"--tfds_data_dir={tfds_data_dir}"] if tfds_data_dir else []
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"The mixture {name!r} could not be cached; the reason stands above.")


def check_vocabulary(cached: cache.Mixture, specification: str | None) -> None:
    """Raise ValueError where a mixture is cached with another vocabulary than `specification` (None: any)."""
    if not specification:
        return
    wanted = open_vocabulary(specification)
    for task in cached.tasks:
        have = task.vocabulary("targets")
        if have.fingerprint != wanted.fingerprint:
            raise ValueError(
                f"Task {task.name!r} of mixture {cached.name!r} is cached in {str(task.directory)!r} with another "
                f"vocabulary ({have.size} ids) than {specification!r} ({wanted.size} ids). Leave VOCABULARY "
                "(--vocabulary) out to use the cache, or give another --cache_dir to cache it anew."
            )


def open_vocabulary(specification: str) -> vocabularies.Vocabulary:
    """Open 'byte' or PATH, either followed by :N for N sentinels (100), as mtjax.tasks.vocabularies does."""
    path, colon, number = specification.rpartition(":")
    if not (colon and number.isdigit()):
        path, number = specification, "100"
    if path == "byte":
        return vocabularies.byte(extra_ids=int(number))
    return vocabularies.sentencepiece(path, extra_ids=int(number))
