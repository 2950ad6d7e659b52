"""Say what :mod:`kd_lightning.pipeline.compare` decided: in the terminal, as Markdown, as JSON, from one record."""
