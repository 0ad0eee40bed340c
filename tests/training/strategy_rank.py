"""One rank that trains recipes one after the other: python -m tests.training.strategy_rank a.yaml b.yaml -> a/, b/."""

import os
import sys
from pathlib import Path

from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.recipe.load import load_recipe
from inl_core.training.checkpoint import newest_valid
from inl_core.training.distributed import World, start_world
from inl_core.training.observer import Observer
from inl_core.training.run import RunFiles
from inl_core.training.run_data import RunData
from inl_core.training.session import empty_model
from inl_core.training.trainer import Trainer
from tests.training.conftest import before_each_step, limit_files


def train(path: Path, world: World) -> None:
    """The run of a recipe, beside it, which goes on where it was; its data is prepared.

    The rank of FULL_RANK has a full disk from the beginning of step 5 to the end of step 6.
    """
    recipe = load_recipe(path)
    assert recipe.data.directory
    data = RunData.load(recipe.data.directory, recipe)
    run = RunFiles(path.with_suffix(""), recipe, data.tokenizer, data.directory)
    trainer = Trainer(empty_model(recipe, data.tokenizer), data, run, world, Observer())
    world.on_main(trainer.run.create)
    if world.on_main(lambda: list_checkpoints(run.checkpoints)):
        trainer.resume(newest_valid(run.checkpoints, lambda text: None, world))
    if str(world.rank) == os.environ.get("FULL_RANK"):
        before_each_step(trainer, lambda step, stop: limit_files(20_000 if step in (4, 5) else None))
    trainer.fit()


if __name__ == "__main__":
    with start_world("cpu") as world:
        for argument in sys.argv[1:]:
            train(Path(argument), world)
