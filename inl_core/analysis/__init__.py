"""Plans and inspections: numbers about a recipe, a data set, a run or a checkpoint."""
