"""What a worker does before it says that it is ready: every weight that it holds is read once, none that it does not hold."""

import pytest

from serving.interface import ServedModel
from serving.parallel.ffn_part import WHOLE_FFN, FFNPart
from serving.spec import load_spec
from serving.workers.build import MANY_ROWS, warm_up_ffn


class Recording:
    """An FFN half that only notes what it is given."""

    def __init__(self) -> None:
        self.rows_of: dict[int, list[int]] = {}
        self.different = 0

    def forward(self, layer, rows):
        self.rows_of.setdefault(layer, []).append(len(rows))
        self.different = max(self.different, len(rows.unique(dim=0)))


@pytest.mark.parametrize("part", [WHOLE_FFN, FFNPart(layers=(1,))], ids=["whole", "one layer"])
def test_every_layer_held_is_given_one_row_a_few_and_many_that_differ(part, tiny_checkpoints):
    directory = tiny_checkpoints["mixtral"]
    model = ServedModel(load_spec(directory), directory, "float32")
    half = Recording()
    warm_up_ffn(half, model, part)
    held = [layer for layer in range(model.spec.num_layers) if part.holds(layer)]
    assert half.rows_of == {layer: [1, 5, MANY_ROWS] for layer in held}
    assert half.different == MANY_ROWS, "rows that are alike choose the same experts"
