"""Paths and headers of requests to the process of the SuperLink, besides those of Flower."""

SECRET = "x-ctde-jax-secret"
"""Header of the secret that gives access to everything."""

OPEN = "/ctde-jax/open"
"""Request of the server after which nodes are let in."""

EXCHANGE = "/ctde-jax/exchange"
"""Request of a node, which sends its reply and gets its next request; see `exchange.py`."""
