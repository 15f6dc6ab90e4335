"""What is done to students after training, without a gradient: scaling by depth (LiNeS) and averages (soups)."""
