"""Centralized training, decentralized execution: one Flax model, trained over many devices.

To read the package, follow the rooms from the bottom to the top; a room imports only rooms below it:

    errors, bundle              exceptions and their checks; what a node has: numpy alone
    devices, data               where training runs; what is learned from
    models, aggregate           what is learned; how replicas agree
    rounds                      what the devices compute
    cost, checkpoint            what a round costs; how nothing is lost
    trainer                     what the host does
    config                      from words to objects and back
    export                      how a model leaves
    train, execute, wire, ...   the commands

The public names are those of `__init__.pyi`. Each is imported when it is first used: `import ctde_jax` alone neither
imports JAX nor touches a device.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
