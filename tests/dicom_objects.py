"""Images of kinds of which no example may be passed on, with what the standard asks of them and somebody's name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from tests.common.test_imaging_hostile import dataset
from tests.common.test_imaging_multiframe import item


def code(value: str, scheme: str, meaning: str) -> Dataset:
    return item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


ORIENTED: dict[str, Any] = {
    "PatientOrientationCodeSequence": [
        item(
            CodeValue="F-10450", CodingSchemeDesignator="SRT", CodeMeaning="recumbent",
            PatientOrientationModifierCodeSequence=[code("F-10340", "SRT", "supine")],
        )
    ],
    "PatientGantryRelationshipCodeSequence": [code("F-10470", "SRT", "headfirst")],
}  # fmt: skip
HEART: dict[str, Any] = {
    "CardiacSynchronizationTechnique": "RETROSPECTIVE", "CardiacSignalSource": "ECG", "CardiacRRIntervalSpecified": 1e3,
    "CardiacBeatRejectionTechnique": "RR_INTERVAL", "LowRRValue": 800, "HighRRValue": 1200, "SkipBeats": 0,
    "IntervalsAcquired": 3, "IntervalsRejected": 0, "CardiacFramingType": "FORW",
}  # fmt: skip
OF_FRAMES: dict[str, Any] = {
    "PixelPresentation": "MONOCHROME", "VolumetricProperties": "VOLUME", "VolumeBasedCalculationTechnique": "NONE",
}  # fmt: skip


def image(sop_class: str, modality: str, frames: int = 0, *, bits: int = 16, **more: Any) -> Dataset:
    stored = np.arange(64 * max(1, frames)).astype(np.uint8 if bits == 8 else np.uint16).reshape(-1, 8)
    made = dataset(
        stored, "2.25.1001", sop_class=sop_class, modality=modality, PatientName="Doe^Jane", PatientID="MRN-4711",
        PatientBirthDate="19700101", PatientSex="F", StudyDate="20200101", StudyTime="101500", StudyID="S1",
        AccessionNumber="ACC1", ReferringPhysicianName="Ref^Phys", SeriesNumber=1, InstanceNumber=1,
        SeriesDate="20200101", SeriesTime="101500", ContentDate="20200101", ContentTime="101501",
        AcquisitionDate="20200101", AcquisitionTime="101501", Manufacturer="Acme", ManufacturerModelName="Model X",
        DeviceSerialNumber="SN123456", SoftwareVersions="v1.2", Rows=8, LossyImageCompression="00",
        BurnedInAnnotation="NO", BitsStored=bits, HighBit=bits - 1,
    )  # fmt: skip
    if frames:
        made.NumberOfFrames = frames
    made.update(item(**more))
    return made


def x_ray_film(modality: str) -> Dataset:
    made = image(
        uid.XRayAngiographicImageStorage if modality == "XA" else uid.XRayRadiofluoroscopicImageStorage, modality, 3,
        bits=8, ImageType=["ORIGINAL", "PRIMARY", "SINGLE PLANE"], FrameIncrementPointer=0x00181063, FrameTime="66.7",
        PatientOrientation=["L", "F"], KVP="80", RadiationSetting="GR", XRayTubeCurrent=100, ExposureTime=10,
        PixelIntensityRelationship="LIN", CollimatorShape="CIRCULAR", CenterOfCircularCollimator=[4, 4],
        RadiusOfCircularCollimator=4, ShutterShape="RECTANGULAR", ShutterLeftVerticalEdge=1, ShutterRightVerticalEdge=8,
        ShutterUpperHorizontalEdge=1, ShutterLowerHorizontalEdge=8, RecommendedViewingMode="SUB",
        MaskSubtractionSequence=[item(MaskOperation="AVG_SUB", MaskFrameNumbers=[1], ApplicableFrameRange=[2, 3])],
    )  # fmt: skip
    if modality == "XA":
        made.update(item(PositionerMotion="STATIC", PositionerPrimaryAngle="10", PositionerSecondaryAngle="0"))
    return made


def scintigram(kind: str, frames: int, pointers: list[int], **more: Any) -> Dataset:
    detector = item(
        CollimatorType="PARA", FieldOfViewShape="RECTANGLE", FieldOfViewDimensions=["400"], FocalDistance="0",
        ZoomFactor=[1, 1], StartAngle="0", RadialPosition=["200"], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=[0, 0, 0],
    )  # fmt: skip
    given = item(RadionuclideCodeSequence=[code("C-163A8", "SRT", "99m Technetium")], Radiopharmaceutical="MDP")
    return image(
        uid.NuclearMedicineImageStorage, "NM", frames, ImageType=["ORIGINAL", "PRIMARY", kind, "EMISSION"],
        FrameOfReferenceUID="2.25.7", PositionReferenceIndicator="", PixelSpacing=[4, 4], NumberOfEnergyWindows=1,
        EnergyWindowInformationSequence=[item(EnergyWindowName="Tc99m")], NumberOfDetectors=1,
        RadiopharmaceuticalInformationSequence=[given], DetectorInformationSequence=[detector], CountsAccumulated=1000,
        EnergyWindowVector=[1] * frames, DetectorVector=[1] * frames,
        FrameIncrementPointer=[0x00540010, 0x00540020, *pointers], **deepcopy(ORIENTED), **more,
    )  # fmt: skip


def mammogram(sop_class: str, intent: str) -> Dataset:
    return image(
        sop_class, "MG", bits=12, ImageType=["ORIGINAL", "PRIMARY", ""], PresentationIntentType=intent,
        PixelIntensityRelationship="LIN", PixelIntensityRelationshipSign=-1, RescaleSlope="1", RescaleIntercept="0",
        RescaleType="US", PresentationLUTShape="IDENTITY", DetectorType="DIRECT", ImagerPixelSpacing=[0.1, 0.1],
        PatientOrientation=["P", "F"], FieldOfViewOrigin=[0, 0], FieldOfViewRotation="0",
        FieldOfViewHorizontalFlip="NO", AcquisitionContextSequence=[], ImageLaterality="R", OrganExposed="BREAST",
        AnatomicRegionSequence=[code("T-04000", "SRT", "Breast")], PositionerType="MAMMOGRAPHIC", PartialView="NO",
        ViewCodeSequence=[
            item(CodeValue="R-10226", CodingSchemeDesignator="SRT", CodeMeaning="MLO", ViewModifierCodeSequence=[])
        ],
        BreastImplantPresent="NO", WindowCenter="2048", WindowWidth="4096",
    )  # fmt: skip


def tooth() -> Dataset:
    made = mammogram(uid.DigitalIntraOralXRayImageStorageForPresentation, "FOR PRESENTATION")
    del made.ViewCodeSequence
    made.Modality, made.PositionerType = "IO", "NONE"
    made.AnatomicRegionSequence = [code("T-11170", "SRT", "Maxilla")]
    made.PrimaryAnatomicStructureSequence = [code("425106001", "SCT", "Mandibular left central incisor tooth")]
    return made


def pet(*kind: str, **more: Any) -> Dataset:
    given = item(RadionuclideCodeSequence=[code("C-111A1", "SRT", "^18^Fluorine")], RadiopharmaceuticalStartTime="0900")
    return image(
        uid.PositronEmissionTomographyImageStorage, "PT", ImageType=["ORIGINAL", "PRIMARY"], Units="BQML",
        CountsSource="EMISSION", SeriesType=list(kind), ReprojectionMethod="SUM", NumberOfSlices=3, ImageIndex=1,
        CorrectedImage=["DECY", "ATTN"], RandomsCorrectionMethod="DLYD", DecayCorrection="START", DecayFactor="1",
        FrameOfReferenceUID="2.25.7", PositionReferenceIndicator="", PixelSpacing=[4, 4], SliceThickness="3",
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 0], RescaleIntercept="0",
        RescaleSlope="1.5", FrameReferenceTime="0", ActualFrameDuration=1000, TypeOfDetectorMotion="NONE",
        CollimatorType="RING", AcquisitionStartCondition="MANU", RadiopharmaceuticalInformationSequence=[given],
        **deepcopy(ORIENTED), **more,
    )  # fmt: skip


def enhanced(sop_class: str, modality: str, groups: dict[str, Dataset], **more: Any) -> Dataset:
    """Three frames with these functional groups beside those of every enhanced image."""
    pointers = [item(DimensionOrganizationUID="2.25.8", DimensionIndexPointer=tag, FunctionalGroupPointer=0x00209111)
                for tag in (0x00209056, 0x00209057)]  # fmt: skip
    made = image(
        sop_class, modality, 3, ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], FrameOfReferenceUID="2.25.7",
        AcquisitionDateTime="20200101101501", AcquisitionDuration=10.0, PositionReferenceIndicator="XY",
        PresentationLUTShape="IDENTITY", ContentQualification="PRODUCT", AcquisitionNumber=1,
        AcquisitionContextSequence=[], SynchronizationFrameOfReferenceUID="2.25.71", AcquisitionTimeSynchronized="N",
        SynchronizationTrigger="NO TRIGGER", DimensionIndexSequence=pointers,
        DimensionOrganizationSequence=[item(DimensionOrganizationUID="2.25.8")], **OF_FRAMES, **more,
    )  # fmt: skip
    frame_type = item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], **OF_FRAMES)
    frame_type.update(groups.pop("type"))
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[1, 1], SliceThickness=2)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        FrameAnatomySequence=[
            item(FrameLaterality="U", AnatomicRegionSequence=[code("T-D3000", "SRT", "Chest")]),
        ],
        PixelValueTransformationSequence=[
            item(RescaleIntercept="0", RescaleSlope="1", RescaleType="HU" if modality == "CT" else "US")
        ],
        **{{"PT": "PETFrameType"}.get(modality, f"{modality}ImageFrameType") + "Sequence": [frame_type]},
        **{f"{name}Sequence": [group] for name, group in groups.items()},
    )  # fmt: skip
    made.SharedFunctionalGroupsSequence = [shared]
    when = {f"Frame{name}DateTime": "20200101101501" for name in ("Reference", "Acquisition")}
    made.PerFrameFunctionalGroupsSequence = [
        item(
            FrameContentSequence=[
                item(FrameAcquisitionNumber=1, FrameAcquisitionDuration=1.0, DimensionIndexValues=[1, z + 1],
                     StackID="1", InStackPositionNumber=z + 1, FrameComments="seen by Dr. Roe", **when)
            ],
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2 * z])],
        )
        for z in range(3)
    ]  # fmt: skip
    return made


def enhanced_ct() -> Dataset:
    groups = {
        "type": Dataset(),
        "CTAcquisitionType": item(AcquisitionType="SPIRAL", ConstantVolumeFlag="NO", FluoroscopyFlag="NO"),
        "CTReconstruction": item(
            ReconstructionAlgorithm="FILTER_BACK_PROJ", ConvolutionKernel="B30f", ConvolutionKernelGroup="BRAIN",
            ReconstructionDiameter=300.0, ReconstructionPixelSpacing=[1.0, 1.0], ImageFilter="one of ours",
        ),
        "CTExposure": item(ExposureTimeInms=5.0, XRayTubeCurrentInmA=100.0, ExposureInmAs=50.0, CTDIvol=5.0,
                           ExposureModulationType=["ANGULAR", "LONGITUDINAL"]),
        "CTXRayDetails": item(KVP="120", FocalSpots=["0.6"], FilterType="WEDGE", FilterMaterial=["ALUMINUM"]),
    }  # fmt: skip
    return enhanced(uid.EnhancedCTImageStorage, "CT", groups, MultienergyCTAcquisition="NO", **HEART)


def enhanced_mr() -> Dataset:
    of_slab = item(SlabThickness=10.0, SlabOrientation=[0.0, 0.0, 1.0], MidSlabPosition=[0.0, 0.0, 0.0])
    groups = {
        "type": item(ComplexImageComponent="MAGNITUDE", AcquisitionContrast="T1"),
        "MRTimingAndRelatedParameters": item(
            RepetitionTime=500.0, FlipAngle=90.0, EchoTrainLength=1, RFEchoTrainLength=1, GradientEchoTrainLength=0,
            SpecificAbsorptionRateSequence=[
                item(SpecificAbsorptionRateDefinition="IEC_WHOLE_BODY", SpecificAbsorptionRateValue=1.0)
            ],
            GradientOutputType="DB_DT", GradientOutput=1.0,
            OperatingModeSequence=[item(OperatingModeType="STATIC FIELD", OperatingMode="IEC_NORMAL")],
        ),
        "MREcho": item(EffectiveEchoTime=10.0),
        "MRSpatialSaturation": of_slab,
        "MRReceiveCoil": item(
            ReceiveCoilName="HEAD32", ReceiveCoilManufacturerName="Acme", ReceiveCoilType="MULTICOIL",
            QuadratureReceiveCoil="NO",
            MultiCoilDefinitionSequence=[item(MultiCoilElementName="E1", MultiCoilElementUsed="YES")],
        ),
        "MRTransmitCoil": item(TransmitCoilName="Q", TransmitCoilManufacturerName="Acme", TransmitCoilType="BODY"),
        "MRAverages": item(NumberOfAverages=1.0),
        "MRImagingModifier": item(MagnetizationTransfer="NONE", BloodSignalNulling="NO", Tagging="NONE",
                                  TransmitterFrequency=63.0, PixelBandwidth=100.0),
        "MRVelocityEncoding": item(VelocityEncodingDirection=[1.0, 0.0, 0.0], VelocityEncodingMinimumValue=0.0,
                                   VelocityEncodingMaximumValue=100.0),
        "MRArterialSpinLabeling": item(
            ASLTechniqueDescription="one of ours", ASLContext="LABEL", ASLCrusherFlag="NO", ASLBolusCutoffFlag="NO",
            ASLSlabSequence=[item(ASLSlabNumber=1, ASLSlabThickness=10.0, ASLSlabOrientation=[0.0, 0.0, 1.0],
                                  ASLMidSlabPosition=[0.0, 0.0, 0.0], ASLPulseTrainDuration=1000)],
        ),
        "RespiratorySynchronization": item(NominalRespiratoryTriggerDelayTime=1.0,
                                           ActualRespiratoryTriggerDelayTime=1.0),
    }  # fmt: skip
    return enhanced(
        uid.EnhancedMRImageStorage, "MR", groups, ComplexImageComponent="MAGNITUDE", AcquisitionContrast="T1",
        ResonantNucleus="1H", KSpaceFiltering="NONE", MagneticFieldStrength=1.5, PhaseContrast="YES",
        ArterialSpinLabelingContrast="PULSED",
        VelocityEncodingAcquisitionSequence=[item(VelocityEncodingDirection=[1.0, 0.0, 0.0])],
        RespiratoryMotionCompensationTechnique="GATING", RespiratorySignalSource="BELT", RespiratoryTriggerType="TIME",
        PulseSequenceName="se", MRAcquisitionType="2D", EchoPulseSequence="SPIN", **HEART,
    )  # fmt: skip


def enhanced_pet() -> Dataset:
    groups = {
        "type": Dataset(),
        "PETFrameAcquisition": item(TableHeight=1.0, GantryDetectorTilt=0.0, GantryDetectorSlew=0.0,
                                    DataCollectionDiameter=700.0),
        "PETDetectorMotionDetails": item(RotationDirection="CW", RevolutionTime=1.0),
        "PETPosition": item(TablePosition=0.0, DataCollectionCenterPatient=[0.0] * 3,
                            ReconstructionTargetCenterPatient=[0.0] * 3),
        "PETFrameCorrectionFactors": item(PrimaryPromptsCountsAccumulated=1000, SliceSensitivityFactor=1.0,
                                          DecayFactor=1.0, ScatterFractionFactor=0.3, DeadTimeFactor=1.0),
        "PETReconstruction": item(ReconstructionType="3D", ReconstructionAlgorithm="REPROJECTION",
                                  IterativeReconstructionMethod="YES", NumberOfIterations=3, NumberOfSubsets=21,
                                  ReconstructionDiameter=600.0, ReconstructionPixelSpacing=[1.0, 1.0]),
        "RadiopharmaceuticalUsage": item(RadiopharmaceuticalAgentNumber=1),
    }  # fmt: skip
    given = item(
        RadiopharmaceuticalAgentNumber=1, RadionuclideCodeSequence=[code("C-111A1", "SRT", "^18^Fluorine")],
        AdministrationRouteCodeSequence=[code("G-D101", "SRT", "Intravenous route")], RadionuclideTotalDose="300",
        RadiopharmaceuticalStartDateTime="20200101090000", RadionuclideHalfLife="6588", RadiopharmaceuticalVolume="1",
        RadionuclidePositronFraction="0.97",
        RadiopharmaceuticalCodeSequence=[code("C-B1031", "SRT", "Fluorodeoxyglucose F^18^")],
    )  # fmt: skip
    corrected = {f"{what}Corrected": "YES" for what in ("Decay", "Attenuation", "Scatter", "DeadTime", "Randoms")}
    return enhanced(
        uid.EnhancedPETImageStorage, "PT", groups, GantryMotionCorrected="NO", PatientMotionCorrected="NO",
        CountLossNormalizationCorrected="NO", NonUniformRadialSamplingCorrected="NO", SensitivityCalibrated="YES",
        DetectorNormalizationCorrection="YES", DecayCorrectionDateTime="20200101100000", RandomsCorrectionMethod="DLYD",
        ScatterCorrectionMethod="one of ours", AttenuationCorrectionSource="CT", CollimatorType="RING",
        AttenuationCorrectionTemporalRelationship="SIMULTANEOUS", AcquisitionStartCondition="MANU",
        AcquisitionTerminationCondition="TIME", TypeOfDetectorMotion="STATIONARY", TimeOfFlightInformationUsed="TRUE",
        DetectorGeometry="CYLINDRICAL_RING", TransverseDetectorSeparation=5.0, AxialDetectorDimension=200.0,
        CoincidenceWindowWidth=4.0, TableMotion="STATIC", CountsSource="EMISSION", TerminationTimeThreshold=1.0,
        EnergyWindowRangeSequence=[item(EnergyWindowLowerLimit="425", EnergyWindowUpperLimit="650")],
        ViewCodeSequence=[code("103340004", "SCT", "Short axis")], SliceProgressionDirection="BASE_TO_APEX",
        RadiopharmaceuticalInformationSequence=[given], **corrected, **deepcopy(ORIENTED),
    )  # fmt: skip


def objects() -> dict[str, Dataset]:
    phase = item(PhaseDelay=0, ActualFrameDuration=1000, PauseBetweenFrames=0, NumberOfFramesInPhase=2)
    beats = item(FrameTime="500", NominalInterval=1000, LowRRValue=800, HighRRValue=1200, IntervalsAcquired=10)
    gate = item(TriggerSourceOrType="Dr. Roe", BeatRejectionFlag="Y", HeartRate=60, DataInformationSequence=[beats])
    turn = item(StartAngle="0", AngularStep="90", RotationDirection="CC", ScanArc="360", ActualFrameDuration=1000,
                RadialPosition=["200"], NumberOfFramesInRotation=2)  # fmt: skip
    turning = {"RotationInformationSequence": [turn], "NumberOfRotations": 1, "TypeOfDetectorMotion": "STEP AND SHOOT"}
    return {
        "angiogram": x_ray_film("XA"),
        "fluoroscopy": x_ray_film("RF"),
        "dynamic scintigram": scintigram(
            "DYNAMIC", 2, [0x00540030, 0x00540100], PhaseVector=[1, 1], TimeSliceVector=[1, 2], NumberOfPhases=1,
            PhaseInformationSequence=[phase],
        ),
        "gated scintigram": scintigram(
            "GATED", 2, [0x00540060, 0x00540070], RRIntervalVector=[1, 1], TimeSlotVector=[1, 2],
            NumberOfRRIntervals=1, NumberOfTimeSlots=2, GatedInformationSequence=[gate],
        ),
        "SPECT": scintigram("TOMO", 2, [0x00540050, 0x00540090], RotationVector=[1] * 2, AngularViewVector=[1, 2],
                            **turning),
        "mammogram": mammogram(uid.DigitalMammographyXRayImageStorageForProcessing, "FOR PROCESSING"),
        "mammogram to be shown": mammogram(
            uid.DigitalMammographyXRayImageStorageForPresentation, "FOR PRESENTATION"
        ),
        "tooth": tooth(),
        "PET": pet("WHOLE BODY", "REPROJECTION"),
        "gated PET": pet("GATED", "IMAGE", TriggerTime="0", FrameTime="100", LowRRValue=800, HighRRValue=1200,
                         NumberOfRRIntervals=1, NumberOfTimeSlots=1, NominalInterval=1000, BeatRejectionFlag="Y"),
        "enhanced CT": enhanced_ct(),
        "enhanced MR": enhanced_mr(),
        "enhanced PET": enhanced_pet(),
    }  # fmt: skip
