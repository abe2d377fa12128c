"""The PTX of the Hopper kernel, run on the CPU by ``ptx_machine.py``: its results, and what the machine refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kernels_cases as cases
import pytest
import torch
from ptx_hopper import compiled, hopper_gpu
from ptx_memory import PtxError
from torch import Tensor

from rewardmap_kernels import PolicyObjective, native, native_cuda, reference
from rewardmap_kernels.torch_rows import FusedRows

PLAIN = PolicyObjective("grpo", kl_coef=0.05, entropy_coef=0.01)
TOKEN_LEVEL = [objective for objective in cases.OBJECTIVES if not objective.needs_sequence]


def built(folder: Path, edit: tuple[str, str] | None = None) -> str:
    try:
        return compiled(folder, edit)
    except native.NativeUnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return built(tmp_path_factory.mktemp("hopper"))


class Problem:
    """Rows whose old, reference and rollout log-probabilities are near the policy's; a fifth masked, NaN there."""

    def __init__(
        self, n: int, vocab: int, objective: PolicyObjective = PLAIN, temperature: Tensor | float = 0.8, stride: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(vocab)
        self.logits = torch.full((n, stride or vocab), 7.0, dtype=torch.bfloat16)[:, :vocab]
        self.logits.copy_(2 * torch.randn(n, vocab, generator=g))
        self.targets = torch.randint(0, vocab, (n,), generator=g)
        self.objective, self.temperature = objective, temperature
        rows = cases.row_inputs(n, dtype=torch.float32)
        self.keep: Tensor = rows.pop("loss_mask")
        self.keep[0], self.keep[1] = True, False
        current = reference.selective_log_softmax(self.logits.float(), self.targets, temperature)[0]
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
            rows[name] = current + 0.3 * (rows[name] + 1.5)
        self.rows: dict[str, Any] = rows

    def run(self, ptx: str, clusters: int = 1, cluster: int | None = None, seed: int | None = None) -> FusedRows:
        """What the kernel makes of a copy of the logits, whose rows lie as far from each other."""
        whole = torch.as_strided(self.logits, (len(self.logits), self.logits.stride(0)), self.logits.stride())
        copy = whole.clone()
        live = copy[:, : self.logits.shape[1]]
        live[~self.keep] = torch.nan
        inputs = {**self.rows, "objective": self.objective}
        with hopper_gpu(ptx, clusters, cluster, seed):
            targets = torch.where(self.keep, self.targets, -100)
            made = native_cuda.fused(live, targets, self.temperature, self.keep, inputs)
        beyond = slice(self.logits.shape[1], None)
        assert torch.equal(copy[:, beyond], whole[:, beyond])
        return made

    def defined(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """logprobs, entropy and the gradient, by the definition in this type."""
        leaf = self.logits.detach().clone().to(dtype if dtype == torch.float64 else torch.bfloat16).requires_grad_()
        wide = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.rows.items()}
        logprobs, entropy = reference.selective_log_softmax(leaf.to(dtype), self.targets, self.temperature)
        loss = reference.policy_row_loss(
            logprobs, entropy=entropy, objective=self.objective, loss_mask=self.keep, **wide
        )
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return logprobs.detach(), entropy.detach(), gradient

    def check(self, made: FusedRows) -> None:
        """At most twice the error of eager bfloat16."""
        exact, eager = self.defined(torch.float64), self.defined(torch.float32)
        on = self.keep
        for got, theirs, wanted in zip((made.logprobs, made.entropy), eager[:2], exact[:2], strict=True):
            assert error(got[on], wanted[on]) <= 2 * error(theirs[on], wanted[on]) + 1e-6
        assert error(made.gradient, exact[2]) <= 2 * error(eager[2], exact[2]) + 1e-6
        for part in made:
            assert (part[~on] == 0).all()


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("objective", TOKEN_LEVEL, ids=cases.objective_id)
def test_every_objective_gives_the_definition(ptx: str, objective: PolicyObjective) -> None:
    problem = Problem(6, 256, objective)
    problem.check(problem.run(ptx, clusters=2, cluster=2))


@pytest.mark.parametrize(("cluster", "clusters", "n"), [(1, 2, 11), (2, 1, 7), (4, 3, 13), (8, 1, 5), (2, 3, 2)])
def test_every_cluster_gives_the_definition(ptx: str, cluster: int, clusters: int, n: int) -> None:
    """Also with more rows than stages, a number of rows that the clusters do not share evenly, clusters without any."""
    problem = Problem(n, 64 * cluster)
    problem.check(problem.run(ptx, clusters, cluster))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_order_of_warps_and_copies_changes_a_bit(ptx: str, seed: int) -> None:
    problem = Problem(6, 128)
    first, other = problem.run(ptx, 1, 2), problem.run(ptx, 1, 2, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_rows_that_a_block_s_threads_pass_over_several_times(ptx: str) -> None:
    """512 threads of 8 columns each; the last pass is for some of them."""
    problem = Problem(3, 8192 + 2048 + 8)
    assert native_cuda.cluster_size(problem.logits.shape[1]) == 1
    problem.check(problem.run(ptx))


@pytest.mark.parametrize("cluster", [1, 2])
def test_rows_apart_from_each_other_with_temperatures_of_their_own_and_columns_at_minus_infinity(
    ptx: str, cluster: int
) -> None:
    problem = Problem(6, 64 * cluster, temperature=torch.linspace(0.5, 1.5, 6), stride=64 * cluster + 24)
    for row in (0, 2):  # by columns, and the whole part of one block or lane
        kept = torch.zeros(64 * cluster, dtype=torch.bool)
        kept[problem.targets[row] // 32 * 32 :][:32] = True
        kept[::7] |= row == 0
        kept[problem.targets[row]] = True
        problem.logits[row, ~kept] = -torch.inf
    problem.check(problem.run(ptx, 1, cluster))


def test_what_an_objective_does_not_read_is_not_there(ptx: str) -> None:
    problem = Problem(4, 64, PolicyObjective("reinforce"))
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        problem.rows[name] = None
    problem.rows["normalizer"] = torch.tensor(3.0)
    made = problem.run(ptx)
    wanted = torch.where(problem.keep, -problem.rows["advantages"] / 3, 0.0)
    torch.testing.assert_close(made.d_logprob, wanted)


CLUSTER_BARRIER = r"barrier\.cluster\.arrive;\s*barrier\.cluster\.wait;"
BROKEN = {
    "a stage is loaded while it is stored": (r"wait_group\.read 1;", "wait_group.read 2;", 0, "still under way"),
    "no wait for the stores": (r"cp\.async\.bulk\.wait_group 0;", "", 0, "ended before its bulk copies"),
    "phase": (r"(mbarrier\.try_wait\S+ \S+ \S+ )(%r\d+);", r"xor.b32 \2, \2, 1; \1\2;", 0, "not waited for|can go on"),
    "no wait": (r"mbarrier\.try_wait\S+ (\w+), [^;]*;", r"setp.eq.u32 \1, 0, 0;", 0, "has not waited for"),
    "bytes": (r"(arrive\.expect_tx\S+ _, \S+ )%r\d+;", r"\1 64;", 0, "no thread can go on"),
    "an arrival twice": (r"(mbarrier\.arrive\.expect_tx[^;]*;)", r"\1 \1", 0, "more arrivals"),
    "arrivals": (r"(mbarrier\.init\S+ \S+ )1;", r"\1 2;", 0, "no thread can go on"),
    "no fence before the store": (r"fence\.proxy\.async\.shared::cta;", "", -1, "without a proxy fence"),
    "no fence after the init": (r"fence\.(mbarrier_init|proxy)\S+\s*// end[^;]*fence\S+", "", 0, "without a fence"),
    "an mbarrier overwritten": (r"(mbarrier\.init\S+ (\S+), 1;)", r"\1 st.shared.u32 \2, 0;", 0, "to an mbarrier"),
    "another cluster's block": (r"(mapa\.u64\s+\S+\s+\S+\s+)%r\d+;", r"\1 2;", 0, "the cluster has no block 2"),
    "no init": (r"mbarrier\.init\S+ \S+ 1;", "", 2, "no mbarrier has been initialised"),
    "no barrier after the init": (CLUSTER_BARRIER, "", 0, "just written"),
    "no barrier of the cluster": (CLUSTER_BARRIER, "bar.sync 0;", 1, "just written|may not have been yet"),
    "no barrier of the block, of warps' sums": (r"bar\.sync\s+0;", "", 0, "just written"),
    "no barrier of the block before the store": (r"bar\.sync\s+0;", "", 1, "just written"),
}
"""What is wrong -> pattern in the PTX, what stands there instead, which of the places, what the machine says."""

@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("what", BROKEN)
def test_the_machine_sees_what_is_wrong(ptx: str, what: str, seed: int | None) -> None:
    pattern, new, which, said = BROKEN[what]
    place = list(re.finditer(pattern, ptx))[which]
    broken = ptx[: place.start()] + place.expand(new) + ptx[place.end() :]
    with pytest.raises(PtxError, match=said):
        Problem(5, 128).run(broken, 1, 2, seed)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("return static_cast<int>(i & 1);", "return static_cast<int>(i & 0);"), "may not have been yet|just written"),
        (("block.cluster_barrier();  // no", "block.publish(0, no_partial());  // no"), "block (ends|that has)"),
        (("threadIdx.x == target / kVector % kThreads", "threadIdx.x == target % kThreads"), "may not have been yet"),
    ],
    ids=["one slot", "a block leaves too early", "two threads write the target"],
)
def test_the_machine_sees_what_is_wrong_in_the_source(edit: tuple[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(PtxError, match=said):
        Problem(4, 128).run(built(tmp_path, edit), 1, 2)


def test_parts_and_rows_have_to_be_whole_vectors(ptx: str) -> None:
    with pytest.raises(PtxError, match="multiples of 16"):
        Problem(3, 72).run(ptx, 1, 2)
    with pytest.raises(PtxError, match="multiples of 16"):
        Problem(3, 64, stride=68).run(ptx)


@pytest.mark.parametrize("vocab", [32_768, pytest.param(262_144, marks=pytest.mark.slow)])
def test_vocabularies_of_models(ptx: str, vocab: int) -> None:
    problem = Problem(5, vocab)
    problem.check(problem.run(ptx))


@pytest.mark.slow
@pytest.mark.parametrize("cluster", native_cuda.CLUSTERS)
@pytest.mark.parametrize("seed", range(4))
def test_many_orders(ptx: str, cluster: int, seed: int) -> None:
    problem = Problem(11, 64 * cluster)
    problem.check(problem.run(ptx, 2, cluster, seed))
