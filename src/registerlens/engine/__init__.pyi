from .ray import RayBackend as RayBackend
from .views import View as View
