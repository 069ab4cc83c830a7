"""What hpcft knows of Slurm: node lists, the allocation it runs in, and the commands it may give."""
