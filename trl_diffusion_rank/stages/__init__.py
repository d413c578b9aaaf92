"""The stages of a recipe, one file each: they read finished artefacts and write one."""
