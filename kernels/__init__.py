"""One folder per operation; installed as ``sign_fast.kernels``.

Each folder holds ``reference.py`` (the operation in plain torch: the oracle and the slow path) and ``op.py``
(registration, dispatch, autograd). Faster versions stand beside them and are held to the reference by the tests.
"""
