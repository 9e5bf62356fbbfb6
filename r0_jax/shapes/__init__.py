"""The embedded world: scenes of coloured shapes, captions in two languages, an exact judge."""
