"""The models have the architecture they claim, and their recipes can be repeated exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models import (
    bert,
    convnext,
    digits_cnn,
    gpt,
    lstm,
    mixer,
    mlp,
    mobile_net,
    resnet,
    swin,
    unet,
    vit,
    wide_resnet,
)
from models.digits import iterate, load_digits

SMALL_WRN: dict[str, Any] = {"depth": 10, "width": 1, "image_size": 8, "batch_size": 4}

RECIPES = [
    pytest.param(mlp.recipe, {}, (32, 64), id="mlp"),
    pytest.param(digits_cnn.recipe, {}, (32, 1, 8, 8), id="digits_cnn"),
    pytest.param(wide_resnet.recipe, SMALL_WRN, (4, 3, 8, 8), id="wide_resnet"),
    pytest.param(vit.recipe, {}, (32, 1, 8, 8), id="vit"),
    pytest.param(gpt.recipe, {"width": 16, "depth": 1}, (12, 64), id="gpt"),
    pytest.param(resnet.recipe, {}, (32, 1, 8, 8), id="resnet"),
    pytest.param(mobile_net.recipe, {}, (32, 1, 8, 8), id="mobile_net"),
    pytest.param(convnext.recipe, {}, (32, 1, 8, 8), id="convnext"),
    pytest.param(swin.recipe, {}, (32, 1, 8, 8), id="swin"),
    pytest.param(unet.recipe, {}, (32, 1, 8, 8), id="unet"),
    pytest.param(mixer.recipe, {}, (32, 1, 8, 8), id="mixer"),
    pytest.param(bert.recipe, {}, (12, 32), id="bert"),
    pytest.param(lstm.recipe, {}, (32, 8), id="lstm"),
]


@pytest.mark.parametrize(("depth", "width", "expected"), [(16, 4, 2_748_890), (28, 10, 36_479_194)])
def test_wide_resnet_has_as_many_parameters_as_the_paper_says(
    depth: int, width: int, expected: int
) -> None:
    # Table 1 of the paper: 2.7 M and 36.5 M; the exact counts follow from its architecture.
    with torch.device("meta"):
        model = wide_resnet.WideResNet(depth, width)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


# torchvision's figures for resnet50 and resnext50_32x4d with 1000 classes.
@pytest.mark.parametrize(
    ("groups", "width", "expected"), [(1, 64, 25_557_032), (32, 4, 25_028_904)]
)
def test_resnet_50_has_as_many_parameters_as_torchvisions(
    groups: int, width: int, expected: int
) -> None:
    with torch.device("meta"):
        model = resnet.ResNet(groups=groups, group_width=width)
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_resnet_refuses_channels_that_the_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"channels=3.*groups=4"):
        resnet.ResNet((1,), 3, groups=4)


def test_wide_resnet_refuses_a_depth_that_it_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"depth=20.*6n \+ 4"):
        wide_resnet.WideResNet(depth=20)


def test_wide_resnet_halves_the_image_twice() -> None:
    model = wide_resnet.WideResNet(10, 2, in_channels=1, num_classes=7).eval()
    sizes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape)))
    logits = model(torch.zeros(2, 1, 16, 16))
    assert sizes == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
    assert logits.shape == (2, 7)


def test_a_block_that_changes_nothing_is_added_to_its_input() -> None:
    block = wide_resnet.WideBlock(4, 4, stride=1, dropout=0.0)
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_dropout_of_a_block_acts_in_training_only() -> None:
    block = wide_resnet.WideBlock(4, 4, stride=1, dropout=0.5)
    x = torch.randn(2, 4, 8, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_digits_cnn_has_the_sizes_it_documents() -> None:
    model = digits_cnn.DigitsCNN(channels=16).eval()
    sizes: list[tuple[int, ...]] = []
    for layer in (model.conv1, model.conv2, model.conv3, model.pool):
        layer.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert sizes == [(16, 8, 8), (32, 4, 4), (32, 4, 4), (32, 2, 2)]


@pytest.mark.parametrize(("recipe", "options", "shape"), RECIPES)
def test_recipe_gives_a_step_and_eight_batches_of_the_documented_shape(
    recipe: Any, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    step, batches = recipe(**options)
    assert len(batches) == 8
    assert {tuple(batch[0].shape) for batch in batches} == {shape}
    assert {batch[-1].dtype for batch in batches} == {torch.int64}
    *inputs, y = batches[0]
    logits = step.model(*inputs)
    classes = logits.shape[1] if recipe is unet.recipe else logits.shape[-1]
    assert logits.numel() == y.numel() * classes
    assert classes > int(max(batch[-1].max() for batch in batches))
    assert step.optimizer.param_groups[0]["rho"] == 0.05


@pytest.mark.parametrize(("recipe", "options", "shape"), RECIPES)
def test_recipe_is_repeatable_and_leaves_the_global_generator_alone(
    recipe: Any, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    del shape
    before = torch.get_rng_state()
    first, first_batches = recipe(seed=3, **options)
    assert torch.equal(torch.get_rng_state(), before)
    second, second_batches = recipe(seed=3, **options)
    other, other_batches = recipe(seed=4, **options)
    weights, again = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not all(torch.equal(weights[k], v) for k, v in other.model.state_dict().items())
    assert torch.equal(first_batches[0][0], second_batches[0][0])
    assert not torch.equal(first_batches[0][0], other_batches[0][0])


@pytest.mark.parametrize(("recipe", "options", "shape"), RECIPES)
def test_recipe_in_float64_has_no_float32_left(
    recipe: Any, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    del shape
    step, batches = recipe(dtype="float64", **options)
    tensors = [*step.model.parameters(), *step.model.buffers(), *(x for b in batches for x in b)]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw", "rmsprop"])
def test_a_few_steps_of_every_optimizer_lower_the_loss(optimizer: str) -> None:
    step, batches = digits_cnn.recipe(optimizer=optimizer, channels=4, num_batches=1)
    losses = [float(step(*batches[0]).loss) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_recipe_names_the_optimizers_it_knows() -> None:
    with pytest.raises(ValueError, match=r"optimizer='lion'.*adam, adamw, nesterov, rmsprop, sgd"):
        mlp.recipe(optimizer="lion")


def test_digits_are_split_without_overlap_or_loss() -> None:
    digits = load_digits(seed=1)
    assert len(digits.train_x) == 1438
    assert len(digits.test_x) == 359
    everything = np.concatenate([digits.train_y, digits.test_y])
    # The known class counts of the data set: nothing lost, nothing twice.
    assert np.bincount(everything).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.train_x.dtype == np.float32
    assert digits.train_x.min() == 0.0
    assert digits.train_x.max() == 1.0


def test_images_stay_with_their_labels() -> None:
    one, other = load_digits(seed=1), load_digits(seed=2)

    def labels_by_image(digits: Any) -> dict[bytes, int]:
        x = np.concatenate([digits.train_x, digits.test_x])
        y = np.concatenate([digits.train_y, digits.test_y])
        return {image.tobytes(): int(label) for image, label in zip(x, y, strict=True)}

    assert labels_by_image(one) == labels_by_image(other)
    assert not np.array_equal(one.train_y, other.train_y)


def test_iterate_ends_with_the_smaller_batch() -> None:
    x, y = np.arange(10.0), np.arange(10)
    assert [len(part) for part, _ in iterate(x, y, 4)] == [4, 4, 2]
    assert np.array_equal(np.concatenate([part for part, _ in iterate(x, y, 4)]), x)


def test_the_loss_of_a_new_gpt_is_that_of_guessing() -> None:
    step, batches = gpt.recipe(width=32, depth=1, num_batches=1)
    vocabulary = step.model.tokens.num_embeddings
    loss = float(gpt.next_token_loss(step.model(batches[0][0]), batches[0][1]).detach())
    assert loss == pytest.approx(np.log(vocabulary), rel=0.05)


def test_a_gpt_looks_back_only() -> None:
    step, batches = gpt.recipe(width=32, depth=2, num_batches=1)
    model, x = step.model.eval(), batches[0][0][:1]
    other = x.clone()
    other[0, 40:] = 0
    with torch.no_grad():
        assert torch.allclose(model(x)[0, :40], model(other)[0, :40], atol=1e-5)
        assert not torch.allclose(model(x)[0, 40:], model(other)[0, 40:], atol=1e-2)


def test_a_vit_takes_each_pixel_once() -> None:
    model = vit.ViT(dropout=0.0, drop_path=0.0)
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    seen = []
    model.embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert model(images).shape == (1, 10)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 1].tolist() == [2, 3, 10, 11]
    assert sorted(seen[0].flatten().tolist()) == list(range(64))


def test_a_bert_sees_no_padding() -> None:
    step, batches = bert.recipe(num_batches=1)
    model = step.model.eval()
    x, mask, _ = batches[0]
    assert not mask.all()
    other = torch.where(mask, x, 0)
    with torch.no_grad():
        assert torch.allclose(model(x, mask)[mask], model(other, mask)[mask], atol=1e-5)
        assert not torch.allclose(model(x, mask), model(x, mask | True), atol=1e-3)


def test_a_bert_guesses_hidden_characters_only() -> None:
    _, batches = bert.recipe(num_batches=2)
    for x, mask, y in batches:
        guessed = y != bert.IGNORED
        assert guessed.any(1).all()
        assert (guessed <= mask).all()
        assert len(x[guessed].unique()) == 1
        assert 0.05 < float(guessed.sum() / mask.sum()) < 0.35


def test_the_windows_of_a_swin_are_put_back_where_they_were() -> None:
    x = torch.randn(2, 8, 12, 3)
    windows = swin.windows_of(x, 4)
    assert windows.shape == (2, 6, 16, 3)
    assert torch.equal(windows[:, 1], x[:, :4, 4:8].flatten(1, 2))
    assert torch.equal(swin.image_of(windows, 4, 8, 12), x)


@pytest.mark.parametrize(("row", "column", "seen"), [(3, 3, 16), (0, 0, 4), (0, 4, 8), (7, 7, 4)])
def test_a_token_of_a_shifted_window_sees_its_neighbours_only(
    row: int, column: int, seen: int
) -> None:
    attention = swin.WindowAttention(4, 1, size=8, window=4, shift=2).double()
    x = torch.randn(1, 8, 8, 4, dtype=torch.float64, requires_grad=True)
    attention(x)[0, row, column].sum().backward()
    assert x.grad is not None
    places = x.grad[0].abs().sum(-1).nonzero()
    assert len(places) == seen
    assert int((places - torch.tensor([row, column])).abs().max()) < 4


def test_a_swin_refuses_windows_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"window=4 does not divide stage 1's size 6"):
        swin.Swin(image_size=12)


def test_a_mobile_net_names_the_activations_it_knows() -> None:
    with pytest.raises(ValueError, match=r"activation='relu'.*hardswish, silu"):
        mobile_net.MobileNet(activation="relu")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_unet_answers_for_every_pixel(transposed: bool) -> None:
    step, batches = unet.recipe(transposed=transposed, num_batches=1)
    x, y = batches[0]
    assert step.model(x).shape == (32, 11, 8, 8)
    assert torch.equal(y == unet.PAPER, x[:, 0] <= 0.5)
    assert {len(image.unique()) for image in y} == {2}


@pytest.mark.parametrize("kind", lstm.KINDS)
def test_an_lstm_reads_the_whole_passage(kind: str) -> None:
    step, batches = lstm.recipe(kind=kind, num_batches=1)
    x = batches[0][0][:1]
    other = x.clone()
    other[0, 0] += 1
    assert not torch.allclose(step.model(x), step.model(other))


def test_an_lstm_names_the_recurrences_it_knows() -> None:
    with pytest.raises(ValueError, match=r"kind='rnn'.*gru, lstm"):
        lstm.recipe(kind="rnn")
