"""Write datasets once in the form that training reads fast: `prepare-data`."""

from epg_fast.data.prepare.digits import prepare_digits
from epg_fast.data.prepare.folder import prepare_folder
from epg_fast.data.prepare.shards import prepare_shards, verify_shards

__all__ = ["prepare_digits", "prepare_folder", "prepare_shards", "verify_shards"]
