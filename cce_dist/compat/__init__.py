"""Functions with the arguments of kernels that other projects copy: to change from them is to change an import.

`verl`: of the linear cross-entropy of verl, slime and SkyRL. `apple`: of Apple's cut-cross-entropy.
"""
