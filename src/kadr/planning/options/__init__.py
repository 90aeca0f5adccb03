"""The placements that each stage can choose from, best first, with the memory and time of each."""
