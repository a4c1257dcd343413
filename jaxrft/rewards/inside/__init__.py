"""What runs inside the sandbox of the reward `code`; it imports the standard library alone.

`sandbox.py` mounts this folder into the sandbox and runs `init`, the first process there. `init`
forks for each program: `candidate` and `cpp` run what a model wrote, `judge` runs the tests of a
task. No process does both, so that no program shares an interpreter with the tests that it has to
pass.
"""
