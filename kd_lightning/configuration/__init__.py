"""What a configuration may hold, and errors that name the path of what is wrong in it.

``arguments`` knows nothing of Hydra, and is what the rest of the package imports.
"""
