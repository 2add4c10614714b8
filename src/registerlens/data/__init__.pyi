from .examples import example_images as example_images
from .hub_sources import HuggingFaceSource as HuggingFaceSource
from .images import ImageStream as ImageStream
from .photographs import shipped_photographs as shipped_photographs
from .sources import FolderSource as FolderSource
from .sources import TensorSource as TensorSource
from .synthetic import synthetic_images as synthetic_images
from .tar_sources import WebDatasetSource as WebDatasetSource
