"""The second half of the name: a trained model leaves as a bundle, in every form that says the same."""

from ctde_jax.export.web import write_page
from ctde_jax.export.write import DEFAULT, FORMATS, Format, Written, write_bundle

__all__ = ["DEFAULT", "FORMATS", "Format", "Written", "write_bundle", "write_page"]
