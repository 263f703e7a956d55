"""Sparse feed-forward blocks: dispatch against naive loops, capacity, groups, statistics, devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mtjax import monitor, optim, program, sharding, tree
from mtjax.data import pipeline
from mtjax.models import decoder_only, exchange, functional, routers, t5
from mtjax.models.layers import MlpBlock, gated
from mtjax.models.moe import MoeConfig, SparseMlp
from mtjax.types import Context

D, F, E = 8, 12, 4
ACTIVATIONS = ("gelu", "linear")
TASKS = program.TaskTable(("a", "b", "c"), ("x", "x", "y"))


def config_of(router, **options):
    return MoeConfig(num_experts=E, every=1, encoder_router=router, decoder_router=None, **options)


def make_block(moe, seed=0):
    """Return (params, call(params, x, context)); gates of large weights, so that choices are clear."""
    make = lambda key: SparseMlp(  # noqa: E731
        moe,
        "encoder",
        emb_dim=D,
        mlp_dim=F,
        activations=ACTIVATIONS,
        dropout_rate=0.0,
        num_sparse_layers=1,
        key=key,
    )
    params = functional.parameters(make(jax.random.key(seed)))
    params["router"] = jax.tree.map(lambda x: x * 50, params["router"])
    abstract = jax.eval_shape(lambda: make(jax.random.key(0)))
    return params, lambda params, x, context: functional.bind(abstract, params)(x, context)


def inputs(rows=3, length=10, seed=1):
    """Return activations and a context of three tasks; rows end in padding."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(length // 2, length, size=(rows, 1))
    task_ids = np.where(mask, rng.integers(0, 3, (rows, length)), -1)
    x = rng.normal(size=(rows, length, D)).astype(np.float32)
    return jnp.asarray(x), Context(task_ids=jnp.asarray(task_ids), mask=jnp.asarray(mask), num_tasks=3)


def expert(params, e, x):
    """Return one expert's output, naively."""
    kernels = params["expert"]
    parts = [x @ kernels[name]["kernel"][e] for name in ("wi_0", "wi_1")]
    return gated(ACTIVATIONS, *parts) @ kernels["wo"]["kernel"][e]


def probabilities(params, x):
    return np.asarray(jax.nn.softmax(x @ params["router"]["router_weights"]["w"]["kernel"]))


def naive(params, x, mask, *, k, slots=None, prioritized=False):
    """Serve every row's choices one by one; returns outputs [B, L, D] and which choices [B, L, K] were served."""
    probs = probabilities(params, x)
    outputs = [np.asarray(expert(params, e, x)) for e in range(E)]
    out, served = np.zeros(x.shape, np.float32), np.zeros((*mask.shape, k), bool)
    for b in range(x.shape[0]):
        left = [slots if slots is not None else 10**6] * E
        best = np.argsort(-probs[b], axis=-1, kind="stable")[:, :k]
        order = range(x.shape[1])
        if prioritized:
            order = sorted(order, key=lambda n: -probs[b, n].max())
        for choice in range(k):
            for n in order:
                e = best[n, choice]
                if mask[b, n] and left[e]:
                    left[e] -= 1
                    served[b, n, choice] = True
                    out[b, n] += probs[b, n, e] * outputs[e][b, n]
    return out, served


def test_one_expert_is_the_dense_block():
    moe = dataclasses.replace(config_of(routers.Switch(jitter=0.0)), num_experts=1)
    params, _ = make_block(moe)
    x, _ = inputs()
    dense = jax.eval_shape(lambda: MlpBlock(D, F, ACTIVATIONS, dropout_rate=0.0, key=jax.random.key(0)))
    kernels = jax.tree.map(lambda kernel: kernel[0], params["expert"])
    expected, _ = functional.bind(dense, kernels)(x, Context())
    for kind in ("dropless", "capacity"):
        moe = dataclasses.replace(moe, dispatch=kind)
        y, aux = make_block(moe)[1](params, x, Context())
        np.testing.assert_allclose(y, expected, atol=1e-6)
        np.testing.assert_allclose(aux.losses["router_balance"], 0.01, rtol=1e-6)  # its least value


@pytest.mark.parametrize("k", [1, 2])
def test_both_dispatches_are_the_naive_sum(k):
    router = routers.TopK(num_selected=k)
    params, call = make_block(config_of(router))
    slotted = make_block(config_of(router, dispatch="capacity", eval_capacity_factor=float(E)))[1]
    x, context = inputs()
    expected, _ = naive(params, x, np.asarray(context.mask), k=k)
    both = [jax.jit(lambda p, f=f: f(p, x, context)) for f in (call, slotted)]
    for function in both:
        y, aux = function(params)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        assert aux.stats["encoder/dropped"].sum() == 0
    loss = lambda function: lambda p: (function(p)[0] ** 2).sum()  # noqa: E731
    gradients = [jax.jit(jax.grad(loss(function)))(params) for function in both]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients)


@pytest.mark.parametrize("prioritized", [False, True])
def test_capacity_serves_first_choices_then_priority_then_position(prioritized):
    router = routers.TopK(num_selected=2, batch_prioritized=prioritized)
    params, call = make_block(config_of(router, dispatch="capacity", eval_capacity_factor=0.3))
    x, context = inputs()
    mask = np.asarray(context.mask)
    expected, served = naive(params, x, mask, k=2, slots=2, prioritized=prioritized)  # ceil(.3 * 10 * 2 / 4)
    y, aux = call(params, x, context)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    dropped = mask & ~served.any(-1)
    assert dropped.sum() > 0
    assert aux.stats["encoder/dropped"].sum() == dropped.sum()
    np.testing.assert_array_equal(np.asarray(y)[dropped], 0.0)  # only the residual passes


def test_statistics_count_by_task():
    params, call = make_block(
        config_of(routers.TopK(num_selected=2), dispatch="capacity", eval_capacity_factor=0.3)
    )
    x, context = inputs()
    stats = call(params, x, context)[1].stats
    mask, task_ids = np.asarray(context.mask), np.asarray(context.task_ids)
    _, served = naive(params, x, mask, k=2, slots=2)
    probs = probabilities(params, x)
    best = np.argsort(-probs, axis=-1)[..., :2]
    for t in range(3):
        here = mask & (task_ids == t)
        load = np.bincount(best[here].ravel(), minlength=E)
        np.testing.assert_array_equal(stats["encoder/expert_load"][t], load)
        assert stats["encoder/tokens"][t] == here.sum()
        assert stats["encoder/dropped"][t] == (here & ~served.any(-1)).sum()
        entropy = -(probs * np.log(probs)).sum(-1)[here].sum()
        np.testing.assert_allclose(stats["encoder/entropy"][t], entropy, rtol=1e-5)
    assert stats["encoder/tokens"][3] == 0
    scalars = monitor.routing(jax.device_get(stats), TASKS.names)
    load = np.bincount(best[mask].ravel(), minlength=E)
    np.testing.assert_allclose(scalars["encoder/moe/load_imbalance"], load.max() / load.mean())
    np.testing.assert_allclose(scalars["encoder/moe/drop_rate"], (mask & ~served.any(-1)).sum() / mask.sum())
    assert {f"task/{name}/encoder/moe/expert_share/{E - 1}" for name in TASKS.names} <= scalars.keys()


@pytest.mark.parametrize(
    "router",
    [routers.TopK(num_selected=2), routers.ExpertsChoose(), routers.Soft(slots_per_expert=2)],
    ids=lambda router: type(router).__name__,
)
def test_rows_and_padding_leave_a_group_alone(router):
    moe = config_of(router, dispatch="capacity", eval_capacity_factor=0.3)
    params, call = make_block(moe)
    x, context = inputs()
    alone = [
        call(params, x[b : b + 1], Context(mask=context.mask[b : b + 1]))[0][0] for b in range(x.shape[0])
    ]
    together, aux = call(params, x, dataclasses.replace(context, task_ids=None))
    mask = np.asarray(context.mask)
    np.testing.assert_allclose(np.asarray(together)[mask], np.stack(alone)[mask], atol=1e-6)
    # What padding holds matters to no token, and takes no expert.
    garbage = jnp.where(context.mask[..., None], x, 100.0)
    y, _ = call(params, garbage, dataclasses.replace(context, task_ids=None))
    np.testing.assert_allclose(np.asarray(y)[mask], np.asarray(together)[mask], atol=1e-6)
    assert aux.stats["encoder/tokens"].sum() == mask.sum()


def test_what_a_row_is_padded_to_changes_no_prediction():
    """Nor does what else is in the batch, where training routes several rows together."""
    moe = config_of(routers.TopK(num_selected=2), dispatch="capacity", eval_capacity_factor=0.5, group_rows=4)
    params, call = make_block(moe)
    x, context = inputs(rows=3)
    short, aux = call(params, x, Context(mask=context.mask))
    assert aux.stats["encoder/dropped"].sum() > 0
    padding = ((0, 0), (0, 30))
    longer, _ = call(params, jnp.pad(x, (*padding, (0, 0))), Context(mask=jnp.pad(context.mask, padding)))
    mask = np.asarray(context.mask)
    np.testing.assert_allclose(np.asarray(longer)[:, :10][mask], np.asarray(short)[mask], atol=1e-6)


def test_dropout_is_of_experts_in_training():
    params, call = make_block(config_of(routers.Switch(jitter=0.0), expert_dropout_rate=0.5))
    x, context = inputs()

    def train(seed):
        return call(params, x, dataclasses.replace(context, key=jax.random.key(seed), train=True))[0]

    calm = call(params, x, context)[0]
    assert not np.allclose(train(0), train(1))
    assert not np.allclose(train(0), calm)
    np.testing.assert_array_equal(train(0), train(0))


def test_an_extra_block_adds_to_the_experts():
    moe = config_of(routers.Switch())
    params, call = make_block(dataclasses.replace(moe, extra_mlp=True))
    x, context = inputs()
    without = make_block(moe)[1]({name: params[name] for name in ("router", "expert")}, x, context)[0]
    parts = [x @ params["extra"][name]["kernel"] for name in ("wi_0", "wi_1")]
    extra = gated(ACTIVATIONS, *parts) @ params["extra"]["wo"]["kernel"]
    np.testing.assert_allclose(call(params, x, context)[0], without + extra, atol=1e-5)


def test_adafactor_treats_every_expert_alone():
    # T5X's rules for mixtures of experts make the expert dim a batch dim.
    rng = np.random.default_rng(0)
    grad, kernel = rng.normal(size=(2, E, 16, 24)).astype(np.float32)
    grad[0] *= 100
    adafactor = optim.adafactor(1.0, min_dim_size_to_factor=8)
    update = lambda p, g: adafactor.update({"mlp": g}, adafactor.init({"mlp": p}), {"mlp": p})[0]["mlp"]  # noqa: E731
    alone = [update(kernel[e], grad[e]) for e in range(E)]
    np.testing.assert_allclose(update(kernel, grad), np.stack(alone), rtol=1e-5)


# --- Models -----------------------------------------------------------------------------------------------

T5 = t5.T5Config(
    vocab_size=64, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=2,
    num_decoder_layers=4, scan_layers=True, remat_policy="full", mlp_activations=("relu",),
    moe=MoeConfig(num_experts=4, every=2, encoder_router=routers.TopK(num_selected=2),
                  decoder_router=routers.Switch(jitter=0.0)),
)  # fmt: skip
ONLY = decoder_only.DecoderOnlyConfig(
    vocab_size=64, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_layers=2, mlp_activations=("relu",),
    moe=dataclasses.replace(T5.moe, encoder_router=None, decoder_router=routers.Hash()),
)  # fmt: skip
ONE = Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(sharding.AXES)), sharding.AXES)
BATCH = pipeline.synthetic_batch(
    {"inputs": 8, "targets": 6}, batch_size=8, vocab_size=64, num_tasks=3, seed=0
)


def initial(model):
    """Return parameters whose routers tell tokens apart."""
    params = jax.jit(model.init)(jax.random.key(0))
    return tree.map_with_path(lambda path, x: x * (50 if "/router/" in path else 1), params)


def test_superblocks_scan_stack_and_decode_as_their_layers():
    scanned, unscanned = t5.t5(T5), t5.t5(dataclasses.replace(T5, scan_layers=False))
    params = initial(scanned)
    layers = functional.unstack_layers(params)
    assert "expert" in layers["decoder"]["layers_3"]["mlp"]
    assert "expert" not in layers["decoder"]["layers_2"]["mlp"]
    jax.tree.map(np.testing.assert_array_equal, functional.stack_layers(layers), params)
    assert jax.tree.structure(layers) == jax.tree.structure(jax.eval_shape(unscanned.init, jax.random.key(0)))
    a, b = jax.jit(scanned.features)(params, BATCH), jax.jit(unscanned.features)(layers, BATCH)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)

    tokens = BATCH["decoder_input_tokens"]
    cache = scanned.start(
        params, jax.jit(scanned.encode)(params, unpacked(BATCH)), max_length=tokens.shape[1]
    )
    expected = scanned.apply(params, unpacked(BATCH)).logits_BLV
    step = jax.jit(scanned.decode)
    for i in range(tokens.shape[1]):
        said, cache = step(params, cache, tokens[:, i])
        real = np.asarray(BATCH["decoder_target_tokens"][:, i] > 0)
        np.testing.assert_allclose(said[real], expected[:, i][real], atol=1e-4)


def test_decoding_after_a_prefix_routes_as_all_at_once():
    model = decoder_only.decoder_only(ONLY)
    params = initial(model)
    rng = np.random.default_rng(1)
    targets = rng.integers(3, 12, (3, 7)).astype(np.int32)
    prefixes, rows = np.asarray([0, 2, 3]), np.arange(3)
    batch = {
        "decoder_target_tokens": jnp.asarray(targets),
        "decoder_input_tokens": jnp.asarray(np.pad(targets, ((0, 0), (1, 0)))[:, :-1]),
        "decoder_causal_attention": jnp.asarray(np.arange(7) <= prefixes[:, None]).astype(jnp.int32),
    }
    expected = jax.jit(model.apply)(params, batch).logits_BLV
    del batch["decoder_target_tokens"]
    cache = model.start(params, jax.jit(model.encode)(params, batch), max_length=3)
    step = jax.jit(model.decode)
    for i in range(3):
        said, cache = step(params, cache, batch["decoder_input_tokens"][rows, prefixes + i])
        np.testing.assert_allclose(said, expected[rows, prefixes + i], atol=1e-4)


def unpacked(batch):
    """Leave out what says which tokens are of one example."""
    return {name: x for name, x in batch.items() if "segment" not in name and "position" not in name}


def test_operations_count_the_chosen_experts():
    lengths = {"inputs": 8, "targets": 6}
    dense = dataclasses.replace(T5, moe=None)
    more = t5.t5(T5).flops(3, lengths=lengths) - t5.t5(dense).flops(3, lengths=lengths)
    product, gate = 16 * 16 * 2, 16 * 4
    # One sparse encoder layer of two experts a token for one dense block, two decoder layers of one.
    assert more == 6 * 3 * (8 * (product + gate) + 2 * 6 * gate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 3}, r"every=3 does not divide the 2 layers of the encoder"),
        ({"dispatch": "droples"}, "Did you mean 'dropless'"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"decoder_router": routers.ExpertsChoose()}, "encoder only"),
        ({"encoder_router": None, "decoder_router": None}, "no router"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(T5, moe=dataclasses.replace(T5.moe, **change))


def test_a_decoder_alone_has_no_encoder_router():
    with pytest.raises(ValueError, match="no encoder"):
        dataclasses.replace(ONLY, moe=T5.moe)


def test_microbatches_route_as_the_batch():
    moe = dataclasses.replace(T5.moe, dispatch="capacity", train_capacity_factor=0.7, every=1, group_rows=2)
    config = dataclasses.replace(T5, moe=moe, num_decoder_layers=1, num_encoder_layers=1)

    def step(microbatches):
        run = program.program(
            model=t5.t5(config), optimizer=optim.transformation("sgd", 0.1), tasks=TASKS, batch_size=8,
            mesh={"data": 1}, microbatches=microbatches,
        )  # fmt: skip
        state = run.init(jax.random.key(0))
        return jax.device_get(run.step(state._replace(params=initial(t5.t5(config))), BATCH))

    (whole, said), (parts, said_in_parts) = step(1), step(4)
    assert said.stats["decoder/dropped"].sum() > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        (whole.params, said.aux, said.stats),
        (parts.params, said_in_parts.aux, said_in_parts.stats),
    )


# --- Devices ----------------------------------------------------------------------------------------------


def test_the_plan_of_an_exchange_brings_every_chunk_to_its_place():
    """Emulate what jax.lax.ragged_all_to_all documents."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 4, (3, 3))
    plans = [jax.device_get(exchange.plan(jnp.asarray(sizes), p)) for p in range(3)]
    sent = [[f"{p}->{q}:{i}" for q in range(3) for i in range(sizes[p, q])] for p in range(3)]
    results = [[""] * 30 for _ in range(3)]
    for p, plan in enumerate(plans):
        for q in range(3):
            start, size = plan.input_offsets[q], plan.send_sizes[q]
            assert size == plans[q].recv_sizes[p]
            results[q][plan.output_offsets[q] : plan.output_offsets[q] + size] = sent[p][start : start + size]
    for q in range(3):
        expected = [f"{p}->{q}:{i}" for p in range(3) for i in range(sizes[p, q])]
        assert [row for row in results[q] if row] == results[q][: len(expected)] == expected


LAYER_ON_DEVICES = """
import itertools, sys
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, "tests")
import test_moe
from mtjax import sharding
from mtjax.models import exchange, routers

def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    '''jax.lax.ragged_all_to_all as documented, by gathering everything.'''
    everyone = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    me = jax.lax.axis_index(axis_name)
    rows = jnp.arange(output.shape[0])
    for p in range(everyone[0].shape[0]):
        data, start, size, to = everyone[0][p], *(x[p][me] for x in everyone[1:])
        here = (rows >= to) & (rows < to + size)
        output = jnp.where(here[:, None], data[jnp.clip(rows - to + start, 0, data.shape[0] - 1)], output)
    return output

x, context = test_moe.inputs(rows=8, length=8)
def run(moe, mesh, ragged=False):
    params, call = test_moe.make_block(moe)
    def loss(params, x):
        y, aux = call(params, x, context)
        return (y ** 2).sum() + 100 * sum(aux.losses.values()), (y, aux)
    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    if mesh is None:
        return jax.device_get(jax.jit(step)(params, x))
    mesh = sharding.make_mesh(mesh)
    rows = sharding.batch_sharding(mesh)
    shardings = sharding.parameter_shardings(mesh, sharding.PARAMETER_RULES, {"a": {"mlp": params}})["a"]["mlp"]
    padded = exchange._exchange_padded
    if ragged:
        jax.lax.ragged_all_to_all, exchange._exchange_padded = emulated, exchange._exchange_ragged
    out = jax.jit(sharding.on_mesh(step, mesh), in_shardings=(shardings, rows))(params, x)
    exchange._exchange_padded = padded
    return jax.device_get(out)

top2 = routers.TopK(num_selected=2, batch_prioritized=True)
"""


def devices_agree(eight_devices, cases):
    code = (
        LAYER_ON_DEVICES
        + f"""
for moe, meshes in {cases}:
    expected = run(moe, None)
    for mesh in meshes:
        ragged = mesh.pop("ragged", False)
        found = run(moe, mesh, ragged)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)
        print("agrees", mesh)
"""
    )
    return eight_devices(code).count("agrees")


def test_eight_devices_serve_every_choice_as_one(eight_devices):
    cases = """[(test_moe.config_of(top2), [
        dict(data=8), dict(fsdp=2, model=4), dict(data=2, expert=4), dict(data=2, expert=4, ragged=True),
        dict(expert=2, sequence=2, model=2), dict(fsdp=2, expert=2, sequence=2)])]"""
    assert devices_agree(eight_devices, cases) == 6


def test_eight_devices_fill_the_same_slots_as_one(eight_devices):
    cases = """[
        (test_moe.config_of(top2, dispatch="capacity", eval_capacity_factor=0.3), [
            dict(data=8), dict(data=2, expert=4), dict(fsdp=2, model=2, expert=2), dict(expert=2, sequence=4)]),
        (test_moe.config_of(routers.ExpertsChoose()), [dict(expert=2, sequence=2, model=2)])]"""
    assert devices_agree(eight_devices, cases) == 5


def test_a_step_on_eight_devices_is_that_of_one(eight_devices):
    code = """
import sys, dataclasses
import jax, numpy as np
sys.path.insert(0, "tests")
import test_moe
from mtjax import optim, program
from mtjax.models import t5

moe = dataclasses.replace(test_moe.T5.moe, every=1)
slots = dataclasses.replace(moe, dispatch="capacity", train_capacity_factor=0.7)
start = None
def step(moe, mesh, microbatches):
    global start
    config = dataclasses.replace(test_moe.T5, moe=moe, num_decoder_layers=1, num_encoder_layers=1)
    run = program.program(
        model=t5.t5(config), optimizer=optim.transformation("sgd", 0.1), tasks=test_moe.TASKS,
        batch_size=8, mesh=mesh, microbatches=microbatches)
    start = start or jax.device_get(test_moe.initial(t5.t5(config)))
    state = run.init(jax.random.key(0))
    state = state._replace(params=jax.device_put(start, run.shardings.params))
    return jax.device_get(run.step(state, test_moe.BATCH))

for moe, mesh in ((moe, dict(data=2, expert=2, model=2)), (slots, dict(fsdp=2, expert=2, sequence=2))):
    one, said = step(moe, test_moe.ONE, 1)
    many, said_by_many = step(moe, mesh, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
                 (one.params, said), (many.params, said_by_many))
    print("agrees", said.stats["decoder/dropped"].sum())
"""
    printed = eight_devices(code)
    assert printed.count("agrees") == 2
    assert "agrees 0.0" in printed
    assert printed.count("agrees 0.0") == 1  # by capacity, some were dropped
