"""Fast candidates in Triton, for any NVIDIA GPU from Ampere on. Imported only when one of them is chosen."""

from shardwright.kernels.triton.ptxas import prefer_sound

prefer_sound()
