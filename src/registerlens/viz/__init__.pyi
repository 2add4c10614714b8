from .attention import AttentionView as AttentionView
from .attention import attention_heads as attention_heads
from .maps import overlay as overlay
from .paper import paper_figure as paper_figure
from .paper import paper_figures as paper_figures
from .tables import styled as styled
from .theme import sized as sized
