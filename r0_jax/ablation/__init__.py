"""Variants of a recipe, trained with several seeds and compared in pairs."""
