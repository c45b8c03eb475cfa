"""Stage taps: named, replaceable, and free when nobody listens."""

import mlx.core as mx
import mlx.nn as nn

from glm_dsa import trace


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = [nn.Linear(2, 2)]

    def __call__(self, x):
        x = trace.tap(self.model.layers[0], "doubled", x * 2)
        return trace.tap(self, "logits", x + 1)


def test_stages_carry_the_modules_path():
    toy = Toy()
    with trace.capture(toy) as seen:
        toy(mx.array([1.0]))
    assert {name: value.tolist() for name, value in seen.items()} == {"layers.0.doubled": [2.0], "logits": [3.0]}


def test_a_replaced_stage_goes_on_in_its_place():
    toy = Toy()
    with trace.capture(toy, {"layers.0.doubled": mx.array([10.0])}) as seen:
        assert toy(mx.array([1.0])).tolist() == [11.0]
    assert seen["layers.0.doubled"].tolist() == [2.0]  # as computed, before it was replaced


def test_who_listens_to_some_names_hears_those_alone():
    toy, heard = Toy(), []
    with trace.listen(toy, lambda stage, value: heard.append(stage) or value, only={"logits"}):
        assert trace.is_listening("logits")
        assert not trace.is_listening("doubled")
        toy(mx.array([1.0]))
    assert heard == ["logits"]
    assert not trace.is_listening("logits")


def test_nobody_listens_afterwards():
    toy = Toy()
    with trace.capture(toy):
        pass
    assert not trace._listeners
    value = mx.array([1.0])
    assert trace.tap(toy, "logits", value) is value


def test_other_models_are_not_heard():
    mine, other = Toy(), Toy()
    with trace.capture(mine) as seen:
        other(mx.array([1.0]))
    assert not seen
