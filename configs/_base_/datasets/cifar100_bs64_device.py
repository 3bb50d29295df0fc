# In place of cifar100_bs64.py: the images stay on the GPU, and are cropped and flipped there.
data_preprocessor = dict(
    type='ClsDataPreprocessor',
    num_classes=100,
    # of the training set, RGB
    mean=[129.285, 124.0575, 112.4295],
    std=[68.1615, 65.382, 70.4055],
    to_rgb=False)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    pin_memory=False,  # there is nothing to copy
    collate_fn=dict(type='mmwsl.already_collated'),
    sampler=dict(type='mmwsl.ViewSampler', shuffle=True),
    dataset=dict(
        type='mmwsl.DeviceDataset',
        padding=4,
        flip_prob=0.5,
        dataset=dict(
            type='CIFAR100', data_root='data/cifar100', split='train', pipeline=[dict(type='PackInputs')])))

val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    pin_memory=False,
    collate_fn=dict(type='mmwsl.already_collated'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmwsl.DeviceDataset',
        dataset=dict(
            type='CIFAR100', data_root='data/cifar100', split='test', pipeline=[dict(type='PackInputs')])))
val_evaluator = dict(type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
