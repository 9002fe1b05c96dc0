"""What `dae-diffusers compare` reads in the folders of runs, and the tables and pictures that it makes of it."""
