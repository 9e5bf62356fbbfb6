import pytest

from configs.ablations import claims, shapes
from r0_jax.ablation import grid
from r0_jax.config_check import check_config
from r0_jax.errors import InputError

RECIPE = """
from r0_jax import config as base

def get_config(method="r0"):
    config = base.get_config()
    config.objective.method = method
    config.test.prompts = "prompts.txt"
    with config.unlocked():
        config.rewards.blue = base.reward_entry("function", function="m:blue")
    return config
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return "recipe.py"


def test_the_runs_of_a_grid(recipe, tmp_path):
    variants = {"R0": (), "no guidance": ("regularizers.guidance.weight=0", "pretrained=models/x")}
    config = grid.get_config(f"{recipe}:r0plus", variants, (3, 5), 20)
    cells = grid.cells(config)
    assert [cell.name for cell in cells] == [
        "R0/seed_3",
        "no_guidance/seed_3",
        "R0/seed_5",
        "no_guidance/seed_5",
    ]
    plain, changed = cells[0].config, cells[3].config
    assert plain.objective.method == "r0plus" and plain.is_locked
    assert plain.test.num_prompts == 20 and plain.test.prompts == str(tmp_path / "prompts.txt")
    assert (plain.seed, changed.seed) == (3, 5)
    assert plain.test.base and not changed.test.base  # the base is measured once a seed
    assert changed.regularizers.guidance.weight == 0.0
    assert changed.pretrained == str(tmp_path / "models" / "x") and plain.pretrained == ""


def test_values_keep_the_type_of_their_field(recipe):
    overrides = ("lora.rank=4", "lora.alpha=4", "sampler.random_eta=False", "best_metric=eval/blue")
    [cell] = grid.cells(grid.get_config(recipe, {"a": overrides}, (0,), 2))
    assert (cell.config.lora.rank, cell.config.lora.alpha) == (4, 4.0)
    assert cell.config.sampler.random_eta is False and cell.config.best_metric == "eval/blue"


@pytest.mark.parametrize(
    "variants, seeds, said",
    [
        ({"a": ("lora.rnak=4",)}, (0,), r"variants\['a'\]: the recipe has no field 'lora.rnak'"),
        ({"a": ("lora.rank=4.5",)}, (0,), "lora.rank=4.5 must be of type int"),
        ({"a": ("steps",)}, (0,), "'steps' is not field=value"),
        ({"a": ("lora=4",)}, (0,), "must be of type ConfigDict"),
        ({"a b": (), "a_b": ()}, (0,), "same folder"),
        ({"a": ()}, (0, 0), "repeats one"),
        ({}, (0,), "at least one variant"),
        ({"a": ()}, (), "and one seed"),
    ],
)
def test_what_is_no_grid(recipe, variants, seeds, said):
    with pytest.raises(InputError, match=said):
        grid.cells(grid.get_config(recipe, variants, seeds, 2))


def test_a_recipe_is_no_ablation_and_an_ablation_needs_test_prompts(recipe, tmp_path):
    from r0_jax import config as base

    with pytest.raises(InputError, match="not that of an ablation"):
        grid.cells(base.get_config())
    (tmp_path / "recipe.py").write_text(RECIPE.replace("prompts.txt", ""))
    with pytest.raises(InputError, match=r"no test\.prompts"):
        grid.cells(grid.get_config(recipe, {"a": ()}, (0,), 2))


def test_the_shipped_ablations_are_grids():
    cells = grid.cells(shapes.get_config())
    assert len(cells) == 15 and cells[0].config.test.num_prompts == 1000
    alone = cells[2].config
    assert not any(entry.weight for entry in alone.rewards.values())
    assert alone.regularizers.guidance.weight == cells[0].config.regularizers.guidance.weight > 0


@pytest.mark.parametrize(
    "variants, count", [("", 12 * 5), ("parts", 7 * 5), ("search", 12 * 3), ("parts,search", 7 * 3)]
)
@pytest.mark.filterwarnings("ignore:no effect")
@pytest.mark.filterwarnings("ignore:no regularizer keeps")  # of the controls
def test_the_claims_are_grids_of_runs_that_start(variants, count):
    cells = grid.cells(claims.get_config(variants))
    assert len(cells) == count and len({cell.name for cell in cells}) == count
    prompts = "validation.txt" if "search" in variants else "test.txt"
    objectives = set()
    for cell in cells[: len({cell.variant for cell in cells})]:  # of the first seed
        check_config(cell.config)
        assert cell.config.test.prompts.endswith(f"/{prompts}")
        objectives.add(cell.config.to_json())
    assert len(objectives) == len({cell.variant for cell in cells})


def test_claims_know_their_variants():
    with pytest.raises(InputError, match="use parts, search or both"):
        claims.get_config("all")
