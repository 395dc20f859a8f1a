"""What a site's images and labels are like, before anything is trained on them. Nothing of it leaves the house."""
