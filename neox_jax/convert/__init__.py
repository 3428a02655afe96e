"""Reading and writing the files the rest of the world uses: names, hf, hub."""
