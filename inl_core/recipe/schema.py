"""The recipe tree as a JSON schema, so that editors complete keys and show what they mean.

- `recipes/recipe.schema.json` is what this file writes; a test compares them.
- The schema describes what a recipe file may hold. Defaults and presets fill in the rest, so only keys without a
  default are required.
"""

import json
from typing import Any

from inl_core.recipe.recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file; every key's docstring is its description."""
    schema = Recipe.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "inl recipe"}


def schema_text() -> str:
    """The schema as it stands in recipes/recipe.schema.json."""
    return json.dumps(recipe_schema(), indent=2) + "\n"
