"""Export for decentralized execution: a bundle with every format that reproduces the outputs."""

from ctde_jax.export.web import write_page
from ctde_jax.export.write import DEFAULT, FORMATS, Format, Written, write_bundle

__all__ = ["DEFAULT", "FORMATS", "Format", "Written", "write_bundle", "write_page"]
