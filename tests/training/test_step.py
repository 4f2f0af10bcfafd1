"""The training step: one golden update, and the same on any number of devices and parts."""

import functools
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.distributed import data_parallel
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import LossScale, TrainState, create_state
from resnet_jax.training.step import _average, loss_per_image, make_train_step, top_k_hits

LENGTH = RunLength(steps=100, steps_per_epoch=10.0)
SLOW = pytest.mark.slow


def tiny(**fields):
    defaults = {
        "stage_sizes": (1,),
        "stage_widths": (8,),
        "block_cls": rj.BasicBlock,
        "stem_cls": functools.partial(rj.CifarStem, features=8),
        "num_classes": 10,
    }
    return rj.ResNet(**{**defaults, **fields})


def configuration(**sections):
    sections = {"schedule": c.Schedule(name="constant"), **sections}
    return c.Config(data=c.Data(image_size=8), **sections)


def batch(size=16):
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8),
        "labels": rng.integers(0, 10, size).astype(np.int32),
    }


def run(model, config, devices=1, steps=2, size=16):
    """State and metrics after some steps on the first devices."""
    optimizer = make_optimizer(config, LENGTH)
    state = create_state(model, optimizer, config, channels=3)
    step = data_parallel.parallel_step(
        make_train_step(model, optimizer, config, LENGTH), jax.devices()[:devices]
    )
    for _ in range(steps):
        state, metrics = step(state, data_parallel.shard(batch(size), devices))
    return jax.device_get((state, metrics))


def test_golden_update():
    """One step of plain SGD, written out."""
    config = configuration(optimizer=c.Optimizer(momentum=0.0, weight_decay=0.0))
    model = tiny()
    state, metrics = run(model, config, steps=1)
    start = create_state(model, make_optimizer(config, LENGTH), config, channels=3)
    data = batch()
    images = (data["images"] / np.float32(255) - 0.5) / 0.25

    def loss(params):
        logits, updates = model.apply(
            {"params": params, "batch_stats": start.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"])
        return losses.mean(), updates["batch_stats"]

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (expected, batch_stats), gradients = gradient(start.params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, start.params, gradients)
    chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state.batch_stats, batch_stats, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1)
    assert state.step == 1


AUGMENT = c.Augment(flip=True, pad=1, mixup=0.2, erase=0.5)  # test_augment.py has the rest


@pytest.mark.devices(8)
def test_eight_devices_equal_one():
    """With shared batch statistics a device is only a place to compute."""
    config = configuration(augment=AUGMENT, train=c.Train(ema_decay=0.9))
    model = tiny(axis_name=data_parallel.AXIS)
    one, eight = run(model, config, devices=1), run(model, config, devices=8)
    chex.assert_trees_all_close(eight, one, rtol=2e-4, atol=2e-5)


@pytest.mark.devices(8)
def test_devices_agree_on_everything():
    """`out_axes=None` shows the first device only: here all eight are looked at."""
    config = configuration(train=c.Train(ema_decay=0.9), augment=AUGMENT)
    model = tiny(dropout_rate=0.2, stochastic_depth_rate=0.2)  # each device its own statistics
    optimizer = make_optimizer(config, LENGTH)
    state = create_state(model, optimizer, config, channels=3)
    step = jax.pmap(
        make_train_step(model, optimizer, config, LENGTH),
        axis_name=data_parallel.AXIS,
        in_axes=(None, 0),
    )
    found = step(state, data_parallel.shard(batch()))
    first = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), found)
    chex.assert_trees_all_equal(first, found)
    assert jax.tree.leaves(found)[0].shape[0] == 8


@pytest.mark.slow
def test_parts_equal_the_whole():
    """Without batch statistics, accumulated gradients are those of the whole batch."""
    model = tiny(norm="group")
    whole = run(model, configuration(augment=AUGMENT))
    parts = run(model, configuration(augment=AUGMENT, train=c.Train(accumulate=2)))
    chex.assert_trees_all_close(parts, whole, rtol=2e-4, atol=2e-5)


def test_other_platforms_loop_over_the_parts():
    """A CPU takes them one after another in the program; for others it has a loop."""
    config, model = configuration(train=c.Train(accumulate=4)), tiny()
    optimizer = make_optimizer(config, LENGTH)
    state = create_state(model, optimizer, config, channels=3)
    programs, results = {}, {}
    for platform in ("cpu", "tpu"):
        one = make_train_step(model, optimizer, config, LENGTH, platform)
        step = data_parallel.parallel_step(one, jax.devices()[:1])
        arguments = state, data_parallel.shard(batch(), 1)
        programs[platform] = step.lower(*arguments).as_text().count("stablehlo.while")
        results[platform] = jax.device_get(step(*arguments))
    assert programs["cpu"] == programs["tpu"] - 1  # JAX 0.7 draws random numbers in loops, too
    chex.assert_trees_all_close(results["tpu"], results["cpu"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.75, pytest.param(0.99998, marks=pytest.mark.slow)])
def test_moving_average(decay):
    """A mean of the states so far, by decaying shares that sum to one: the start has none."""
    config = configuration(train=c.Train(ema_decay=decay, ema_every=2))
    model = tiny()
    start = create_state(model, make_optimizer(config, LENGTH), config, channels=3)
    states = [run(model, config, steps=steps)[0] for steps in range(1, 7)]
    chex.assert_trees_all_equal(states[0].ema, start.ema)
    shares = np.array([decay**2, decay, 1.0])
    expected = jax.tree.map(
        lambda *each: np.average(np.stack(each), axis=0, weights=shares),
        *(states[step - 1].variables for step in (2, 4, 6)),
    )
    chex.assert_trees_all_close(states[5].ema, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(states[4].ema, states[3].ema)


def test_the_average_of_a_long_run():
    """Of torchvision's recipe: 23,458 updates, of which none keeps what the first one had."""
    decay = 1 - 2e-5 * 1024 * 32 / 600
    config = configuration(train=c.Train(ema_decay=decay, ema_every=32))

    def update(ema, step):
        state = TrainState(step, {"w": step / 1e4}, {}, None, ema, None)
        return _average(state, config), None

    start = {"params": {"w": jnp.float32(1e6)}, "batch_stats": {}}
    steps = 32 * jnp.arange(1, 23_459)
    ema, _ = jax.lax.scan(update, start, steps)
    shares = decay ** np.arange(23_457, -1, -1.0)
    expected = np.average(np.asarray(steps) / 1e4, weights=shares)
    np.testing.assert_allclose(ema["params"]["w"], expected, rtol=1e-5)


def test_a_frozen_backbone_keeps_everything_but_the_head():
    config = configuration(optimizer=c.Optimizer(backbone_rate=0.0))
    model = tiny()
    start = create_state(model, make_optimizer(config, LENGTH), config, channels=3)
    state, _ = run(model, config)
    for part in start.params:
        same = jax.tree.map(np.array_equal, state.params[part], start.params[part])
        assert all(jax.tree.leaves(same)) == (part != "head")
    chex.assert_trees_all_equal(state.batch_stats, start.batch_stats)


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=SLOW), "float16"])
def test_half_precision(dtype):
    config = configuration(model=c.Model(dtype=dtype))
    exact, _ = run(tiny(), configuration())
    state, metrics = run(tiny(dtype=jnp.dtype(dtype)), config)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
    chex.assert_trees_all_close(state.params, exact.params, atol=0.02)
    assert (state.loss_scale is not None) == (dtype == "float16")
    assert np.isfinite(metrics["loss"])


class Poisonable(nn.Module):
    """A stem in which a white image makes something infinite or not a number."""

    what: str
    activate: bool = True
    conv_cls: Any = None
    norm_cls: Any = None
    stride: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x, train):
        white = (x == 2).all((1, 2, 3)).any()  # 255 -> (1 - 0.5) / 0.25
        weight = self.param("weight", nn.initializers.ones, ())
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if self.what == "loss":
            x = jnp.where(white, jnp.nan, x)
        elif self.what == "gradients":  # that of the root is infinite at 0
            x = x * (1 + jnp.sqrt(weight - jax.lax.stop_gradient(weight) + (1 - white)))
        elif self.what == "squares":  # finite gradients, whose squares are not
            x = x * (1 + 1e30 * white * (weight - jax.lax.stop_gradient(weight)))
        elif train:
            seen.value = jnp.where(white, jnp.inf, seen.value + 1)
        stem = rj.CifarStem(8, self.activate, self.conv_cls, self.norm_cls, name="stem")
        return stem(x * weight, train)


def poisonable(what):
    stem = functools.partial(Poisonable, what=what)
    return tiny(stem_cls=stem)


def poisoned_batch(at, size=16):
    found = batch(size)
    found["images"][at] = 255
    return found


def steps_of(model, config, devices=1, platform=""):
    """The first state, and a function from a state and a batch to the next ones."""
    optimizer = make_optimizer(config, LENGTH)
    step = jax.pmap(
        make_train_step(model, optimizer, config, LENGTH, platform),
        axis_name=data_parallel.AXIS,
        in_axes=(None, 0),
        devices=jax.devices()[:devices],
    )

    def take(state, data):
        return jax.device_get(step(state, data_parallel.shard(data, devices)))

    return create_state(model, optimizer, config, channels=3), take


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def check_skipped(found, before, metrics):
    """Equal to the bit on every device, but for the number of steps."""
    assert (metrics["skipped"] == 1).all()
    assert (found.step == before.step + 1).all()
    same = jax.tree.map(lambda f, b: np.array_equal(f, np.broadcast_to(b, f.shape)), found, before)
    assert all(jax.tree.leaves(same.replace(step=True)))


OPTIMIZERS = {
    "lars": c.Optimizer(name="lars", clip_norm=1.0),
    "lamb": c.Optimizer(name="lamb"),
    "adamw": c.Optimizer(name="adamw"),
}


@pytest.mark.parametrize(
    "what",
    ["loss", pytest.param("gradients", marks=SLOW), pytest.param("statistics", marks=SLOW)],
)
@pytest.mark.devices(8)
def test_a_step_with_nan_on_one_device_is_skipped_on_all(what):
    """Whatever it is that is not a number; the steps before and after it are taken."""
    config = configuration(
        train=c.Train(ema_decay=0.9, accumulate=2), schedule=c.Schedule(name="plateau")
    )
    model = poisonable(what)
    state, take = steps_of(model, config, devices=8)
    state, metrics = take(state, batch(32))
    assert (metrics["skipped"] == 0).all()
    before = first(state)
    skipped, metrics = take(before, poisoned_batch(at=13, size=32))
    if what != "loss":  # alone it would not tell
        assert np.isfinite(metrics["loss"]).all()
    check_skipped(skipped, before, metrics)
    after, metrics = take(first(skipped), batch(32))
    assert (metrics["skipped"] == 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after.params, after.ema)))


@pytest.mark.parametrize(
    "name", ["lars", pytest.param("lamb", marks=SLOW), pytest.param("adamw", marks=SLOW)]
)
def test_every_optimizer_skips(name):
    """Adam's second moment would be infinite, and the parameters for ever as they are."""
    config = configuration(optimizer=OPTIMIZERS[name])
    model = poisonable("squares")
    state, take = steps_of(model, config)
    before = first(take(state, batch())[0])
    found, metrics = take(before, poisoned_batch(at=3))
    check_skipped(found, before, metrics)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=SLOW), "gpu"])
def test_an_infinite_update_is_skipped(platform):
    config = configuration(optimizer=c.Optimizer(learning_rate=1e38))
    state, take = steps_of(poisonable(""), config, platform=platform)
    found, metrics = take(state, batch())
    assert np.isfinite(metrics["loss"]).all()
    check_skipped(found, state, metrics)


def test_a_skipped_step_is_none_of_the_schedules():
    """The reported rate is the one that the step uses."""
    config = configuration(schedule=c.Schedule(name="linear"))
    state, take = steps_of(poisonable("loss"), config)
    rates = []
    for data in (batch(), poisoned_batch(at=0), batch()):
        state, metrics = take(state, data)
        state = first(state)
        rates.append(float(metrics["learning_rate"][0]))
    np.testing.assert_allclose(rates, [0.1, 0.099, 0.099], rtol=1e-6)


def test_an_overflow_is_skipped_and_halves_the_scale():
    config = configuration(model=c.Model(dtype="float16"))
    state, take = steps_of(tiny(dtype=jnp.float16), config)
    huge = state.replace(loss_scale=LossScale(np.float32(2.0**40), np.int32(5)))
    found, metrics = take(huge, batch())
    scale = found.loss_scale
    assert (scale.value.item(), scale.good_steps.item()) == (2.0**39, 0)
    check_skipped(found.replace(loss_scale=None), state.replace(loss_scale=None), metrics)


def test_the_loss_scale_grows_again():
    scale = LossScale(jnp.float32(8), jnp.int32(1_999)).update(jnp.array(True))
    assert (float(scale.value), int(scale.good_steps)) == (16.0, 0)


def test_losses():
    logits = np.array([[2.0, -1.0, 0.5]], np.float32)
    targets = np.array([[0.7, 0.3, 0.0]], np.float32)
    log_probabilities = logits - np.log(np.exp(logits).sum())
    softmax = loss_per_image(logits, targets, c.Loss())
    np.testing.assert_allclose(softmax, -(targets * log_probabilities).sum(1), rtol=1e-5)
    smooth = 0.9 * targets + 0.1 / 3
    smoothed = loss_per_image(logits, targets, c.Loss(label_smoothing=0.1))
    np.testing.assert_allclose(smoothed, -(smooth * log_probabilities).sum(1), rtol=1e-5)

    def binary(y):
        p = 1 / (1 + np.exp(-logits))
        return -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(1)

    np.testing.assert_allclose(
        loss_per_image(logits, targets, c.Loss(name="bce")), binary(targets), rtol=1e-5
    )
    hard = loss_per_image(logits, targets, c.Loss(name="bce", bce_threshold=0.2))
    np.testing.assert_allclose(hard, binary(np.array([[1.0, 1.0, 0.0]])), rtol=1e-5)


def probabilities(logits):
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss(gamma):
    """The formula of torchvision's sigmoid_focal_loss, for hard and soft targets, without alpha."""
    logits = np.array([[2.0, -1.0, 0.5], [-3.0, 0.1, 4.0]], np.float32)
    p = probabilities(logits)
    for targets in (np.eye(3, dtype=np.float32)[:2], np.full((2, 3), [0.7, 0.3, 0.0], np.float32)):
        cross_entropy = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
        p_t = p * targets + (1 - p) * (1 - targets)
        found = loss_per_image(logits, targets, c.Loss(name="focal", focal_gamma=gamma))
        np.testing.assert_allclose(
            found, ((1 - p_t) ** gamma * cross_entropy).mean(1), rtol=1e-5, atol=1e-7
        )


def test_focal_loss_of_sure_answers_has_finite_gradients():
    config, targets = c.Loss(name="focal", focal_gamma=0.5), jnp.eye(2)[:1]
    for sure in (-200.0, 200.0):
        logits = jnp.array([[sure, -sure]])
        gradients = jax.grad(lambda x: loss_per_image(x, targets, config).sum())(logits)
        assert jnp.isfinite(gradients).all()


@pytest.mark.parametrize("targets", [np.eye(3)[1:2], np.array([[0.7, 0.3, 0.0]])], ids=str)
def test_class_weights(targets):
    """PyTorch's formulas: `weight` of cross_entropy, and `pos_weight` of the binary one."""
    logits, weights = np.array([[2.0, -1.0, 0.5]], np.float32), np.array([0.5, 3.0, 1.0])
    targets = targets.astype(np.float32)
    p, log_probabilities = probabilities(logits), logits - np.log(np.exp(logits).sum())

    def loss(**fields):
        return loss_per_image(logits, targets, c.Loss(**fields), weights.astype(np.float32))

    def assert_is(found, expected):
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    assert_is(loss(), -(weights * targets * log_probabilities).sum(1))
    smooth = 0.9 * targets + 0.1 / 3
    assert_is(loss(label_smoothing=0.1), -(weights * smooth * log_probabilities).sum(1))
    binary = -(weights * targets * np.log(p) + (1 - targets) * np.log(1 - p))
    assert_is(loss(name="bce"), binary.mean(1))
    assert_is(
        loss(name="focal", focal_gamma=0.0, bce_threshold=0.5), hard_binary(targets, weights, p)
    )
    p_t = p * targets + (1 - p) * (1 - targets)
    cross_entropy = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    focal = (weights * targets + 1 - targets) * (1 - p_t) ** 2 * cross_entropy
    assert_is(loss(name="focal"), focal.mean(1))


def hard_binary(targets, weights, p):
    hard = targets > 0.5
    return -np.where(hard, weights * np.log(p), np.log(1 - p)).mean(1)


@pytest.mark.devices(2)
@pytest.mark.parametrize("name", ["softmax", pytest.param("bce", marks=SLOW)])
def test_class_weights_of_a_step(name):
    """The same on two devices; of softmax as if images stood as often in it as weights say."""
    weights = np.array([0, 1, 2, 3, 2, 1, 0, 1, 2, 3], np.float32)
    sgd = c.Optimizer(momentum=0.0, weight_decay=0.0)
    config, model = configuration(loss=c.Loss(name=name), optimizer=sgd), tiny(norm="group")
    optimizer, data = make_optimizer(config, LENGTH), batch(8)
    data["labels"] = np.arange(8, dtype=np.int32)
    state = create_state(model, optimizer, config, channels=3)

    def gradients(weights, data, devices=1):
        one = make_train_step(model, optimizer, config, LENGTH, class_weights=weights)
        step = data_parallel.parallel_step(one, jax.devices()[:devices])
        new, metrics = step(state, data_parallel.shard(data, devices))
        moved = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), new.params, state.params)
        return float(metrics["loss"]), moved

    found = gradients(weights, data)
    chex.assert_trees_all_close(gradients(weights, data, devices=2), found, rtol=1e-4, atol=1e-6)
    if name == "bce":  # whose weights are those of the positive terms only
        return
    copies = np.repeat(np.arange(8), weights[:8].astype(int))
    repeated = gradients(None, {key: x[copies] for key, x in data.items()})
    share = len(copies) / 8
    scaled = jax.tree.map(lambda x: share * x, repeated)
    chex.assert_trees_all_close(found, scaled, rtol=1e-4, atol=1e-5)


def test_ties_and_nan_are_no_hits():
    logits = jnp.array([[1.0, 1.0, 0.0], [3.0, 2.0, 1.0], [jnp.nan, 0.0, 0.0]])
    labels = jnp.array([0, 1, 0])
    assert top_k_hits(logits, labels, 1).tolist() == [False, False, False]
    assert top_k_hits(logits, labels, 2).tolist() == [True, True, False]


@pytest.mark.devices(8)
def test_batches_that_do_not_divide():
    devices = jax.device_count()
    with pytest.raises(rj.ResNetJaxError, match=rf"train\.batch_size = 12: .*{devices} devices"):
        data_parallel.check_divisible({"train.batch_size": 12})
    with pytest.raises(rj.ResNetJaxError, match=r"x 2 \(pairs\)"):
        data_parallel.check_divisible({"train.batch_size": devices}, parts=2, why="pairs")
