"""The contract suite, generated: every (method, check) pair once, on a kind and a dtype drawn by a seed of the day.

`DELTATUNE_CONTRACT_SEED=n` draws as another day did; the full product of kinds and dtypes is marked `slow`. With
`DELTATUNE_CONTRACT_SHARE=n` one pair in n runs, another one each day: the oldest supported transformers has that much time.
"""

import dataclasses
import datetime
import os
from typing import Any

import pytest

from deltatune import contract
from deltatune.contract.pair import two_processes
from deltatune.core.compose import PRESETS, Preset
from deltatune.core.method import METHODS, Method, named

SEED = int(os.environ.get("DELTATUNE_CONTRACT_SEED", datetime.date.today().toordinal()))
OURS: dict[str, type[Method] | Preset] = {n: m for n, m in METHODS.items() if m.__module__.startswith("deltatune.")}
OURS |= PRESETS
CASES = [(name, check.name) for name, method in OURS.items() for check in contract.checks_of(method)]
if (share := int(os.environ.get("DELTATUNE_CONTRACT_SHARE", 1))) > 1:
    CASES = CASES[SEED % share :: share]
NEEDED = ["copies", "rows", "save_load", "trains"]  # an exemption from these is no exception but a defect


def settle(results: list[contract.Result], name: str) -> None:
    """One result of pytest's for those of the suite."""
    again = f"DELTATUNE_CONTRACT_SEED={SEED} draws it again"
    print(again)
    failed = [r for r in results if r.status == "failed"]
    assert not failed, f"{name}, {again}:\n{contract.text(failed)}"
    if all(r.status in ("skipped", "exempt") for r in results):
        pytest.skip(f"{results[0].status}: {results[0].detail}")


@pytest.mark.parametrize(("name", "check"), CASES, ids=["-".join(case) for case in CASES])
def test_contract(name: str, check: str) -> None:
    settle(contract.run_check(named(name), check, seed=SEED), name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), CASES, ids=["-".join(case) for case in CASES])
def test_full_product(name: str, check: str) -> None:
    settle(contract.run_check(named(name), check, seed=SEED, full=True), name)


def jobs(full: bool) -> list[tuple[str, type[Method] | Preset, str, str]]:
    """What the pair of processes runs: every method under DDP and FSDP2."""
    found = []
    for name, method in OURS.items():
        beds = [bed.name for bed in contract.beds_of(method) if not bed.later]
        beds = beds if full else [beds[(SEED + len(name)) % len(beds)]]
        found += [
            (how, method, bed, "float32") for how in contract.PAIR if how not in method.exceptions for bed in beds
        ]
    return found


def _pair(full: bool) -> None:
    todo = jobs(full)
    texts = two_processes(todo, SEED)
    wrong = [
        f"{method.name} {how} on {bed}: {text}" for (how, method, bed, _), text in zip(todo, texts, strict=True) if text
    ]
    assert not wrong, f"DELTATUNE_CONTRACT_SEED={SEED}:\n" + "\n".join(wrong)


def test_two_processes() -> None:
    """DDP and FSDP2, one pair of processes for all methods."""
    _pair(full=False)


@pytest.mark.slow
def test_two_processes_everywhere() -> None:
    _pair(full=True)


@pytest.mark.parametrize("name", OURS)
def test_exceptions_are_real(name: str) -> None:
    """An exception names a check that the method fails somewhere, and says why; a stale one has to go."""
    method = named(name)
    if isinstance(method, Preset):
        bare: Any = dataclasses.replace(method, exceptions={})
    else:
        bare = type("Bare", (method,), {"exceptions": {}})
        bare.name = name
    for check, reason in method.exceptions.items():
        assert check in (*contract.CHECKS, *contract.PAIR)
        assert check not in NEEDED
        assert len(reason.split()) > 3
        if check in contract.PAIR:
            beds = [bed.name for bed in contract.beds_of(method) if not bed.later]
            failed = any(two_processes([(check, method, bed, "float32") for bed in beds], SEED))
        else:
            failed = any(r.status == "failed" for r in contract.run_check(bare, check, seed=SEED, full=True))
        assert failed, f"{name} passes {check} everywhere: its exception is stale"


STILL = [name for name, method in METHODS.items() if method.still and name in OURS]


@pytest.mark.parametrize("name", STILL)
def test_stillness_is_real(name: str) -> None:
    """A tensor whose gradient may be zero has a zero gradient somewhere, and the method says why."""
    method = METHODS[name]
    for slot, reason in method.still.items():
        assert slot in method.slots and method.slots[slot].train
        assert len(reason.split()) > 3
        bare: Any = type("Bare", (method,), {"still": {k: v for k, v in method.still.items() if k != slot}})
        bare.name = name
        results = contract.run_check(bare, "trains", seed=SEED, full=True)
        assert any(f"{slot} is zero" in r.detail for r in results), f"{name}: {slot} moves everywhere"


def test_a_method_has_its_share() -> None:
    """Every method is tried on every bed that suits it, and every bed suits some method."""
    idle = {bed.name for bed in contract.BEDS.values() if not any(bed.suits(method) for method in METHODS.values())}
    idle -= {bed.name for bed in contract.beds_of(PRESETS["s4"])}
    assert idle <= {"span", "block", "quantised"}, f"no method is tried on {sorted(idle)}"
