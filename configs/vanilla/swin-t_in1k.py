# mmpretrain's own recipe: a transformer does not train with SGD as the convolutional networks do
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
