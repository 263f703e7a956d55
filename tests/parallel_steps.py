"""Take one step of small models under many meshes of eight devices; a process of tests/test_parallel.py.

Prints a JSON object by case: the largest differences from one device, and the compiled step's collectives.

    python tests/parallel_steps.py           all cases
    python tests/parallel_steps.py --write   write the collectives to tests/golden/collectives.json: where a
                                             change of the model, of a rule or of XLA is meant to change them
"""

import json
import os
import pathlib
import sys

if __name__ == "__main__":  # before jax; little optimisation, what is compared is neither fast nor large
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from mtjax import hlo, optim, program, sharding, tree
from mtjax.data import pipeline
from mtjax.models import decoder_only, t5

SIZES = {"vocab_size": 96, "emb_dim": 32, "num_heads": 4, "head_dim": 8, "mlp_dim": 48}
MODELS = {
    "t5": lambda **options: t5.t5(
        t5.T5Config(**SIZES, num_encoder_layers=2, num_decoder_layers=2, **options)
    ),
    "decoder_only": lambda **options: decoder_only.decoder_only(
        decoder_only.DecoderOnlyConfig(**SIZES, num_layers=2, **options)
    ),
}
RATE = 0.5
GOLDEN = pathlib.Path(__file__).parent / "golden" / "collectives.json"
KERNEL = {  # a matrix that 'fsdp' and 'model' cut
    ("t5", True): "encoder/layers/mlp/wo/kernel",
    ("t5", False): "encoder/layers_0/mlp/wo/kernel",
    ("decoder_only", True): "decoder/layers/mlp/wo/kernel",
}
TASKS = program.TaskTable(("a", "b", "c"), ("x", "x", "y"))
# case: model, scan_layers, microbatches, mesh. Rows are packed.
CASES = {
    "slice_fsdp": ("t5", True, 1, {"slice": 2, "fsdp": 4}),
    "data": ("t5", True, 1, {"data": 8}),
    "fsdp": ("t5", True, 1, {"fsdp": 8}),
    "data_model": ("t5", True, 1, {"data": 2, "model": 4}),
    "sequence": ("t5", True, 1, {"sequence": 8}),
    "fsdp_sequence_model": ("t5", False, 2, {"fsdp": 2, "sequence": 2, "model": 2}),
    "decoder_only": ("decoder_only", True, 2, {"data": 2, "fsdp": 2, "model": 2}),
}


def build(name, scan, microbatches, mesh, **options):
    """Build the program of a case; the optimizer is plain SGD, so that an update is the gradient."""
    return program.program(
        model=MODELS[name](scan_layers=scan, remat_policy="minimal" if scan else "none"),
        optimizer=optim.transformation("sgd", RATE),
        tasks=TASKS,
        batch_size=16,
        mesh=mesh,
        microbatches=microbatches,
        **options,
    )


def batch(name):
    """Return packed rows, four segments each."""
    architecture = "decoder_only" if name == "decoder_only" else "encoder_decoder"
    return pipeline.synthetic_batch(
        {"inputs": 16, "targets": 8}, 16, SIZES["vocab_size"], 3, seed=0, architecture=architecture
    )


def compiled(run, rows):
    """Compile the step of a program for its mesh."""
    like = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(run.mesh))
        for name, x in rows.items()
    }
    return run.step.lower(run.abstract, like).compile()


def collectives(step):
    """Sum counts and bytes of a compiled step's collectives by kind; list the largest of each."""
    found = {}
    for collective in hlo.parse(step.as_text()).collectives:
        entry = found.setdefault(collective.kind, {"count": 0, "bytes": 0, "of": {}})
        entry["count"] += collective.times
        entry["bytes"] += collective.times * collective.size
        what = f"{collective.source} {collective.size}"
        entry["of"][what] = entry["of"].get(what, 0) + collective.times
    return found


def differences(found, golden):
    """List the collectives that came, went or changed their number, with what they come from and their bytes."""
    lines = []
    for kind in sorted({*found, *golden}):
        of, was = (side.get(kind, {"of": {}})["of"] for side in (found, golden))
        for what in sorted({*of, *was}):
            if of.get(what, 0) != was.get(what, 0):
                source, _, size = what.rpartition(" ")
                lines.append(
                    f"  {kind} of {size} bytes in {source or '?'}: {was.get(what, 0)} -> {of.get(what, 0)}"
                )
    return lines


def one_device(name, scan, microbatches):
    """Return the state before, and the state and metrics after, a step on one device."""
    run = build(name, scan, microbatches, sharding.make_mesh(devices=jax.devices()[:1]))
    before = run.init(jax.random.key(0))
    kept = before._replace(key=jax.random.key_data(before.key))
    kept = jax.tree.map(np.array, kept)  # copies: the step takes the buffers
    state, metrics = run.step(before, sharding.global_batch(run.mesh, batch(name)))
    return kept, jax.device_get((state.params, metrics))


def largest(got, want):
    """Return the largest absolute difference of two trees."""
    return max(
        float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    )


def compare(case, reference, *, init):
    """Return the largest differences from one device; with `init`, of a state that the program itself made."""
    name, scan, microbatches, mesh = CASES[case]
    run, rows = build(name, scan, microbatches, mesh), batch(name)
    step = compiled(run, rows)
    state, (params, metrics) = reference
    if init:
        state = run.init(jax.random.key(0))
    else:
        state = jax.device_put(state._replace(key=jax.random.wrap_key_data(state.key)), run.shardings)
    before = jax.tree.map(np.array, state.params)  # copies: the step takes the buffers
    started = largest(before, reference[0].params)
    kernel = tree.flatten(state.params)[KERNEL[name, scan]]
    parts = kernel.size / kernel.addressable_shards[0].data.size
    state, said = jax.device_get(step(state, sharding.global_batch(run.mesh, rows)))
    gradient = lambda after: jax.tree.map(lambda a, b: (a - b) / RATE, before, after)  # noqa: E731
    return {
        "init": started,
        "parts": parts,
        "loss": largest(said.total, metrics.total) / float(metrics.total.loss_T),
        "task_losses": largest(said.tasks, metrics.tasks) / float(metrics.total.loss_T),
        "gradient": largest(gradient(state.params), gradient(params)),
        "params": largest(state.params, params),
        "size": float(tree.norm(gradient(params))),
        "collectives": collectives(step),
    }


def main():
    """Compare every case, or those named."""
    named = [argument for argument in sys.argv[1:] if argument != "--write"]
    references, results = {}, {}
    for case in named or CASES:
        key = CASES[case][:3]
        is_first = key not in references
        if is_first:
            references[key] = one_device(*key)
        print(case, file=sys.stderr)
        results[case] = compare(case, references[key], init=is_first)
    if "--write" in sys.argv:
        golden = {case: result["collectives"] for case, result in results.items()}
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
