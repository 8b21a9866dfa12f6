"""The Hopper kernel's forms on a Hopper GPU: LoRA epilogue, dependent launches, prepared launches.

Run with `-s`: every test measures all of its cases, prints them in one table and only then judges.
"""

# ruff: noqa: T201

import pytest
import torch

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import dispatch, launch_internals, nvfp4_hopper, nvfp4_workspace, ops

LIMIT = 4e-3
BUCKETS = list(dispatch._HOPPER)
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count


def packed(n, k):
    codes, block, global_scale = ops.quantize((torch.randn(n, k, device="cuda") * 0.02).bfloat16())
    return codes, block, global_scale.reciprocal()


def exact_weight(weight):
    return nvfp4.exact_products(weight[0], weight[1], torch.float32).double() * weight[2].double()


def config(bucket, **changed):
    return {"kernel": "hopper", **dispatch._HOPPER[bucket], **changed}


def relative(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def poison():
    device = torch.device("cuda", torch.cuda.current_device())
    nvfp4_workspace.partial_sums(device, 1).fill_(float("nan"))
    nvfp4_workspace.permuted(device, 1).fill_(float("nan"))
    torch.full((1 << 24,), float("nan"), device=device, dtype=torch.bfloat16)  # freed at once: outputs land here


def run(x, weight, config, h=None, lora=None):
    return nvfp4_hopper.linear(x, *weight, config, MULTIPROCESSORS, h, lora)


def bits(x):
    return x.view(torch.int16)


def ranks_of(bucket):
    """Every form of the epilogue's loop; each is a kernel to compile, so not every rank at every bucket."""
    return {8: (0, 16, 32, 64, 128), 256: (0,)}.get(bucket, (0, 16, 64))


@pytest.mark.parametrize("waves", [-1, 0])
def test_a_lora_branch_in_the_epilogue_agrees_with_float64(waves):
    worst = {}
    for n, k in ((5120, 1024), (1000, 2304)):
        weight = packed(n, k)
        exact = exact_weight(weight)
        for bucket in BUCKETS:
            for rank in ranks_of(bucket):
                for m in (max(1, bucket - 3), 2 * bucket + 1):
                    x = torch.randn(m, k, device="cuda").bfloat16()
                    # as large as x · Wᵀ, so that a wrong row or rank cannot hide; columns of a larger matrix
                    h = torch.randn(m, 3 * max(rank, 16), device="cuda").bfloat16()[:, :rank] if rank else None
                    lora = (torch.randn(n, rank, device="cuda") * 0.1).bfloat16() if rank else None
                    y = x.double() @ exact.T
                    if rank:
                        y += h.double() @ lora.double().T
                    poison()
                    chosen = config(bucket, waves=waves)
                    first = run(x, weight, chosen, h, lora)
                    error = relative(first, y)
                    equal = all(torch.equal(bits(first), bits(run(x, weight, chosen, h, lora))) for _ in range(6))
                    key = (bucket, rank)
                    old = worst.get(key, (0.0, True))
                    worst[key] = (max(old[0], error if error == error else 9.0), old[1] and equal)
    print(f"\nLoRA epilogue, waves {waves}: largest error by (bucket, rank); ! where a repeat differed")
    for bucket in BUCKETS:
        cells = [(rank, *worst[bucket, rank]) for rank in ranks_of(bucket)]
        print(f"{bucket:4d}", *(f"| {rank} {error:.2e}{'' if equal else '!'}" for rank, error, equal in cells))
    assert all(equal and error < LIMIT for error, equal in worst.values())


def test_dependent_launches_back_to_back_change_nothing():
    """Calls of different weights, inputs and modes follow each other without synchronisation: no buffer is overrun."""
    weights = [packed(5120, 2048), packed(2048, 5120), packed(1536, 2048)]
    wrong = {}
    for bucket in BUCKETS:
        for waves in (-1, 0):
            xs = [torch.randn(bucket, w[0].shape[1] * 2, device="cuda").bfloat16() for w in weights]
            h = torch.randn(bucket, 16, device="cuda").bfloat16()
            loras = [(torch.randn(w[0].shape[0], 16, device="cuda") * 0.1).bfloat16() for w in weights]
            expected = []
            for x, w, lora in zip(xs, weights, loras, strict=True):
                expected.append(bits(run(x, w, config(bucket, waves=waves, dependent=0), h, lora)))
                torch.cuda.synchronize()
            for mode in (0, 1, 2, 3, "mixed"):
                got = []
                for i in range(60):
                    dependent = (1, 2, 0, 3, 2, 1, 3)[i % 7] if mode == "mixed" else mode
                    fresh_h = h + 0  # written by the kernel right before the call
                    j = i % 3
                    got.append(
                        run(xs[j], weights[j], config(bucket, waves=waves, dependent=dependent), fresh_h, loras[j])
                    )
                torch.cuda.synchronize()
                bad = sum(not torch.equal(bits(y), expected[i % 3]) for i, y in enumerate(got))
                wrong[bucket, waves, mode] = bad
    print("\ncalls of 60 that differ, by (bucket, waves, dependent):", {k: v for k, v in wrong.items() if v} or "none")
    assert not any(wrong.values())


def test_chains_where_a_product_is_the_next_input_survive_capture_and_replay():
    weights = [packed(2048, 2048) for _ in range(3)]
    wrong = []
    for bucket in (8, 64, 256):
        for dependent in (0, 1, 2, 3):
            chosen = config(bucket, dependent=dependent, waves=0)
            x = torch.randn(bucket, 2048, device="cuda").bfloat16()

            def chain(x=x, chosen=chosen):
                for w in weights:
                    x = run(x, w, chosen)
                return x

            expected = [chain().clone() for _ in range(3)][-1]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = chain()
            allocated = torch.cuda.memory_allocated()
            for _ in range(20):
                poison()
                graph.replay()
                if not torch.equal(bits(y), bits(expected)):
                    wrong.append((bucket, dependent))
            if torch.cuda.memory_allocated() != allocated:
                wrong.append((bucket, dependent, "grew"))
    print("\nreplays that differ, by (bucket, dependent):", sorted(set(map(str, wrong))) or "none")
    assert not wrong


def test_side_by_side_token_tiles_and_two_accumulators_agree_with_float64():
    """`groups` of CTAs over the same weights, for 2 to 7 tiles of tokens; and `rows` 128, two accumulators."""
    weight = packed(2560, 2304)
    exact = exact_weight(weight)
    cases = [(config(256, groups=4, waves=waves), m) for waves in (-1, 0) for m in (512, 763, 1024, 1100, 1500, 1700)]
    cases += [(config(64, rows=128, slots_w=3, slots_x=3, waves=waves), m) for waves in (-1, 0) for m in (61, 64, 200)]
    cases += [
        (config(128, rows=128, slots_w=3, slots_x=3, waves=waves), m) for waves in (-1, 0) for m in (121, 128, 300)
    ]
    bad = []
    for chosen, m in cases:
        x = torch.randn(m, 2304, device="cuda").bfloat16()
        poison()
        first = run(x, weight, chosen)
        error = relative(first, x.double() @ exact.T)
        equal = all(torch.equal(bits(first), bits(run(x, weight, chosen))) for _ in range(6))
        keys = {key: chosen.get(key) for key in ("rows", "tokens", "groups", "waves")}
        name = f"{keys} M {m}"
        print(f"{name}: {error:.2e}{'' if equal else ' DIFFERS'}", flush=True)
        if not (error < LIMIT and equal):
            bad.append(name)
    assert not bad


def test_a_prepared_launch_is_the_public_launch(monkeypatch):
    assert launch_internals.AVAILABLE
    weight = packed(1536, 2048)
    x = torch.randn(40, 2048, device="cuda").bfloat16()
    chosen = config(64)
    results = [run(x, weight, chosen) for _ in range(4)]
    form = nvfp4_hopper._plan(40, 1536, 2048, 0, False, MULTIPROCESSORS, tuple(chosen.items())).launch
    print("\nprepared kinds of launch:", len([p for p in form.prepared.values() if p]), "waiting:", len(form.once))
    assert any(form.prepared.values())
    monkeypatch.setattr(launch_internals, "watched", lambda: True)
    assert all(torch.equal(bits(r), bits(run(x, weight, chosen))) for r in results)


def test_a_weight_at_the_address_of_a_freed_one_is_read_anew():
    """The encoded descriptor is found again under its address; what lies there is the new weight's."""
    x = torch.randn(8, 2048, device="cuda").bfloat16()
    addresses = set()
    for _ in range(6):
        weight = packed(1536, 2048)
        addresses.add(weight[0].data_ptr())
        exact = x.double() @ exact_weight(weight).T
        for _ in range(4):
            assert relative(run(x, weight, config(8)), exact) < LIMIT
        del weight
    print("\naddresses of six weights:", len(addresses))


def test_two_streams_do_not_share_scratch():
    weight = packed(5120, 2048)
    chosen = config(64, waves=0)
    xs = [torch.randn(64, 2048, device="cuda").bfloat16() for _ in range(2)]
    expected = [bits(run(x, weight, chosen)) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = []
    for _ in range(40):
        for x, stream, y in zip(xs, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                got.append((run(x, weight, chosen), y))
    torch.cuda.synchronize()
    assert all(torch.equal(bits(y), e) for y, e in got)
