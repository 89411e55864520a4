"""The stages of the recipe, one file each; each assembles parts for one of the two loops."""
