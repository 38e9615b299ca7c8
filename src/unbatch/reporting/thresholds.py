"""Thresholds: from where on an example counts as recovered, and a score as more than chance."""

EXACT = 1e-4  # relative l2 error up to which an example counts as recovered exactly
COPY_ERROR = 1e-2  # relative l2 error up to which it counts as a copy
COPY_PSNR = 40.0  # dB of the domain's range from which a picture counts as a copy: off by a hundredth of the range
ALIKE_SSIM = 0.5  # structural similarity from which people recognise a picture
NEAR_CHANCE = 3.0  # dB above what as many prior draws score, within which a score owes nothing to the update
FAR_FROM_CHANCE = 10.0  # dB above it from which an example counts as recognisable: a tenth of chance's squared error
SETTLED_FREEDOM = 1e-2  # relative distance within which all that explains an update must lie, to stand for the batch
