"""A user's network is trained and evaluated by the name that a recipe registers for it."""

import resnet_jax as rj
from resnet_jax.cli import parser
from resnet_jax.models import registry
from tests.training.runs import records

RECIPE = """
import flax.linen as nn

import resnet_jax as rj
from resnet_jax.training.config import Config, Data, Model, Train


class OneConvBlock(rj.ResidualBlock):
    @nn.compact
    def __call__(self, x, train):
        y = self.conv_cls(self.width, 3, stride=self.stride, name="conv1")(x)
        y = self.norm_cls(scale_init=self.last_scale_init, name="norm1")(y, train)
        return nn.relu(self.add_shortcut(y, x, train))


rj.register_model(
    "one_conv", stage_sizes=(1,), stage_widths=(16,), block_cls=OneConvBlock,
    stem_cls=rj.CifarStem, image_size=8, replace=True, norm=nn.LayerNorm,
)


def get_config():
    return Config(data=Data(image_size=8), train=Train(steps=2, batch_size=16))
"""


def test_a_network_is_trained_by_its_registered_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    recipe, run = tmp_path / "recipe.py", tmp_path / "run"
    recipe.write_text(RECIPE)
    flags = [f"--config={recipe}", f"--workdir={run}", "--config.model.name=one_conv"]
    flags += ["--config.log.tensorboard=false", "--config.log.report=false"]
    assert parser.main(["train", *flags]) == 0
    assert [record["step"] for record in records(run)][-1] == 2
    evaluate = ["evaluate", str(run), "--json=-"]
    assert parser.main(evaluate) == 0
    model = rj.create_model("one_conv", num_classes=10)
    variables = rj.load_weights(model, run)
    assert set(variables) == {"params"}
    assert set(variables["params"]["stage1"]["block1"]) == {"conv1", "norm1"}

    capsys.readouterr()
    registry._ARCHITECTURES.pop("one_conv")
    assert parser.main(evaluate) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "one_conv" in line
    assert "rj.register_model" in line
    assert parser.main([*evaluate, f"--recipe={recipe}"]) == 0
    assert parser.main([*evaluate, "--recipe=nothing.py"]) == 2
    assert "error: --recipe=nothing.py: " in capsys.readouterr().err


def test_an_unknown_network_is_an_error_before_training(tmp_path, capsys):
    flags = [f"--workdir={tmp_path / 'run'}", "--config.model.name=one_conv"]
    assert parser.main(["train", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.name = 'one_conv': unknown model 'one_conv'")
    assert not (tmp_path / "run").exists()
