"""Write datasets once in the form that training reads fast: `prepare-data`."""

from epg_fast.data.prepare.crops import prepare_folder, prepare_shards, verify_shards
from epg_fast.data.prepare.digits import prepare_digits

__all__ = ["prepare_digits", "prepare_folder", "prepare_shards", "verify_shards"]
