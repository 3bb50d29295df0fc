# Instead of cifar100_bs64.py: the images stay on the GPU, and are cropped and flipped there.
_base_ = 'cifar100_bs64.py'

train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,  # there is nothing to copy
    collate_fn=dict(_delete_=True, type='mmwsl.identity_collate'),
    dataset=dict(
        _delete_=True,
        type='mmwsl.DeviceDataset',
        padding=4,
        flip_prob=0.5,
        dataset=dict(type='CIFAR100', data_root='data/cifar100', split='train', pipeline=[dict(type='PackInputs')]),
    ),
)

val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    collate_fn=dict(_delete_=True, type='mmwsl.identity_collate'),
    dataset=dict(
        _delete_=True,
        type='mmwsl.DeviceDataset',
        dataset=dict(type='CIFAR100', data_root='data/cifar100', split='test', pipeline=[dict(type='PackInputs')]),
    ),
)

test_dataloader = val_dataloader
