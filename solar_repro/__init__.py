"""Rebuilds Tables 3 to 7 of the SOLAR 10.7B paper from notebooks: SFT, stepwise DPO, merging and H6."""
import logging

__version__ = "0.1.0"

# Imported on a processor with AVX512-BF16, it warns that it cannot have a kernel of the Hub, which is not used here.
logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
