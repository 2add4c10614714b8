from .attention import AttentionView as AttentionView
from .attention import attention_heads as attention_heads
from .overlay import overlay as overlay
from .paper import paper_figure as paper_figure
from .paper import paper_figures as paper_figures
from .sizes import sized as sized
from .styled import styled as styled
