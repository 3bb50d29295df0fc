# for MobileNetV2 and the ShuffleNets
_base_ = 'cifar_240e.py'

optim_wrapper = dict(optimizer=dict(lr=0.01))
