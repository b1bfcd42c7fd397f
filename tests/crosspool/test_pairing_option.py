"""Pairing as an option: simulated models that share two devices all go on, and the command says what it brings."""

import pytest

from crosspool.bench_pairing import main, served_models, tokens_per_s
from serving import registry
from serving.errors import UserError

pytestmark = pytest.mark.cpu


def test_no_model_is_left_behind_when_models_are_paired():
    models = served_models()
    fair, paired = (tokens_per_s(models, models, pairing, 1, "h200", 0.5) for pairing in ("fair", "profile"))
    for name, speed in paired.items():
        assert speed > 0.5 * fair[name]


def test_the_command_prints_both_and_that_they_are_simulated(capsys):
    assert main(["--batch", "1", "--seconds", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("SIMULATED h200")
    assert "fair: work" in printed and "profile: work" in printed


def test_an_unknown_pairing_is_refused():
    with pytest.raises(UserError, match="option pairing is 'luck'; known: fair, profile"):
        registry.create("crosspool", {"pairing": "luck"})
