"""What is read from a compiled module: loops, products, memory traffic and collectives, against an unrolled one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import hlo

LAYERS, WIDTH = 5, 16


def compiled(scan):
    """Compile the gradient of a stack of layers, scanned or not."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(weights, x):
        if scan:
            return jax.lax.scan(layer, x, weights)[0].sum()
        for w in weights:
            x, _ = layer(x, w)
        return x.sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((LAYERS, WIDTH, WIDTH), (8, WIDTH))]
    return jax.jit(jax.grad(loss)).lower(*shapes).compile()


def test_a_scanned_stack_costs_what_the_unrolled_one_does():
    scanned, unrolled = (hlo.parse(compiled(scan).as_text()) for scan in (True, False))
    one = 2 * 8 * WIDTH * WIDTH
    # Forward, and two products backward; the first layer's input needs no gradient where XLA sees it.
    assert unrolled.flops in (one * (3 * LAYERS - 1), one * 3 * LAYERS)
    assert scanned.flops == one * 3 * LAYERS
    assert LAYERS in scanned.times.values() and set(unrolled.times.values()) == {1}
    # XLA counts the body of the loop once.
    assert compiled(True).cost_analysis()["flops"] < 0.6 * scanned.flops
    assert 0.3 < scanned.hbm_bytes / unrolled.hbm_bytes < 3


HEADER = "HloModule m, entry_computation_layout={()->f32[]}\n\n"
LOOP = """
%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(LIMIT)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i.1, %step)
  %x = f32[4]{0} get-tuple-element(%p.1), index=1
  %sum = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add, metadata={op_name="jit(f)/while/body/psum"}
  ROOT %out = (s32[], f32[4]) tuple(%next, %sum)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %zero = s32[] constant(1)
  %start = (s32[], f32[4]) tuple(%zero, %a)
  %loop = (s32[], f32[4]) while(%start), condition=%cond, body=%body
  ROOT %r = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_loops_without_a_known_trip_count_are_counted_by_their_counter():
    module = hlo.parse(HEADER + LOOP.replace("LIMIT", "8"))
    assert module.times == {"main": 1, "body": 4}  # 1, 3, 5, 7
    (psum,) = module.collectives
    assert (psum.kind, psum.size, psum.times, psum.groups) == ("all-reduce", 16, 4, ((0, 1), (2, 3)))
    assert psum.sent == 4 * 16 * 2 * (1 / 2) and psum.source == "jit(f)/while/body/psum"
    unknown = LOOP.replace("constant(LIMIT)", "get-tuple-element(%p), index=1")
    with pytest.raises(ValueError, match=r"Cannot read how often the loop loop .* runs"):
        hlo.parse(HEADER + unknown).collectives  # noqa: B018


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=1,'b'=2,'c'=2] {'b','c'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_groups_of_a_collective(text, groups):
    line = f"  %g = f32[8]{{0}} all-gather(%x), channel_id=7, replica_groups={text}, dimensions={{0}}"
    module = hlo.parse(f"ENTRY %m (x: f32[4]) -> f32[8] {{\n  %x = f32[4]{{0}} parameter(0)\n{line}\n}}\n")
    (gather,) = module.collectives
    assert gather.groups == groups and gather.size == 32


def test_groups_of_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match="Cannot read the replica groups 'all'"):
        hlo._groups("all")


@pytest.mark.parametrize(
    ("attributes", "shapes", "flops"),
    [
        # As TPUs write x @ w, and a batch of products: its batch dim is a dilated spatial one.
        ("dim_labels=bf_io->bf", ("f32[8,16]", "f32[16,32]", "f32[8,32]"), 2 * 8 * 16 * 32),
        (
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            ("f32[4,8,16]", "f32[4,16,32]", "f32[4,8,32]"),
            2 * 4 * 8 * 16 * 32,
        ),
    ],
)
def test_products_written_as_convolutions(attributes, shapes, flops):
    x, w, out = shapes
    text = f"""ENTRY %m (x: {x}, w: {w}) -> {out} {{
  %x = {x}{{1,0}} parameter(0)
  %w = {w}{{1,0}} parameter(1)
  ROOT %y = {out}{{1,0}} convolution(%x, %w), {attributes}
}}
"""
    assert hlo.parse(text).flops == flops


def test_a_kernel_counts_what_its_author_declared():
    text = """ENTRY %m (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"123"}}
}
"""
    assert hlo.parse(text).flops == 123
    assert np.isclose(hlo.parse(text).hbm_bytes, 32)
