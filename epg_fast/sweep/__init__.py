"""`epg-fast sweep`: the best guidance, interval, EMA width and number of steps of a model, by drawing and judging.

command   draws and judges round after round, on all ranks
grid      the settings to try, from the texts of the command line
halving   how many images a round has, and which settings go on
folder    sweep.json, which knows all rounds, and the rows of images until their round is decided
report    table, plots, and the commands that draw and judge the final images
"""

from epg_fast.sweep.command import run

__all__ = ["run"]
