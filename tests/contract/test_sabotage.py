"""Every check catches the method that breaks it, and lets the sound one through."""

import pytest

from deltatune import contract
from deltatune.contract.pair import two_processes
from deltatune.core.method import Method

NEVER = {"peft_round_trip"}  # it has nothing to look at before HF PEFT's formats have an issue


@pytest.mark.parametrize("check", [name for name in contract.CHECKS if name not in NEVER])
def test_each_check_can_fail(broken: dict[str, type[Method]], check: str) -> None:
    for name in (check, f"{check}_too"):
        if name in broken:
            kinds = ["biased"] if contract.BEDS["biased"].suits(broken[name]) else None
            results = contract.run_check(broken[name], check, seed=1, kinds=kinds)
            assert [r.status for r in results] == ["failed"], f"{name}: {contract.text(results)}"
    assert check in broken


@pytest.mark.parametrize("check", [c.name for c in contract.CHECKS.values() if not c.in_place and c.name not in NEVER])
def test_the_sound_one_passes(broken: dict[str, type[Method]], check: str) -> None:
    results = contract.run_check(broken["sound"], check, seed=1)
    assert [r.status for r in results] == ["skipped" if check == "limits" else "passed"], contract.text(results)


def test_the_pair_can_fail(broken: dict[str, type[Method]]) -> None:
    """In one pair of processes: the sound one passes before and after the broken ones."""
    names = ["sound", *contract.PAIR, "sound"]
    jobs = [(how, broken[name], "biased", "float32") for name in names for how in contract.PAIR]
    texts = dict(
        zip(
            [(name, how, i) for i, name in enumerate(names) for how in contract.PAIR],
            two_processes(jobs, 1),
            strict=True,
        )
    )
    for (name, how, _), text in texts.items():
        assert bool(text) == (name in contract.PAIR), f"{name} under {how}: {text or 'nothing was found'}"
