"""Federated training: nodes with separate data, and a server that combines their messages.

A *node* has data that never leave it. It takes the local steps of a round and sends a message, the
encoded change of the parameters, to the *server*, which combines the messages of a round and
answers all nodes with the same bytes. From these, every node computes the next *center*: the
central parameters, the model state and the state of the outer optimizer.

`Node` and `Server` exchange bytes and do not depend on how they travel; `flower/` carries them over
Flower's SuperLink. Importing this package does not import JAX, because short-lived processes import
it.
"""
