"""What a de-identified copy may hold beyond table E.1-1: the table lists what is known to identify people, this lists
what a reader of images needs. An attribute in neither is dropped; so is a word outside the vocabulary.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pydicom.datadict import tag_for_keyword


def _tags(words: str) -> frozenset[int]:
    found = [tag_for_keyword(word) for word in words.split()]
    assert None not in found
    return frozenset(int(tag) for tag in found if tag is not None)


NUMBERS = frozenset({"DS", "IS", "US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"})
NUMBER_GROUPS = frozenset({0x0018, 0x0020, 0x0028, 0x0054, 0x5200})
"""Acquisition, relationship, image, nuclear medicine: numbers of machines and geometry."""

SEQUENCES = _tags(
    """SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PixelMeasuresSequence PlanePositionSequence
    PlaneOrientationSequence FrameContentSequence FrameVOILUTSequence PixelValueTransformationSequence
    CTImageFrameTypeSequence MRImageFrameTypeSequence PETFrameTypeSequence CTAcquisitionTypeSequence
    CTAcquisitionDetailsSequence CTTableDynamicsSequence CTPositionSequence CTGeometrySequence
    CTReconstructionSequence CTExposureSequence CTXRayDetailsSequence CardiacSynchronizationSequence
    MRTimingAndRelatedParametersSequence MREchoSequence MRModifierSequence MRReceiveCoilSequence
    MRFOVGeometrySequence MRAveragesSequence MRDiffusionSequence MRVelocityEncodingSequence
    DiffusionGradientDirectionSequence DiffusionBMatrixSequence TemporalPositionSequence
    DimensionIndexSequence DimensionOrganizationSequence ModalityLUTSequence VOILUTSequence
    RadiopharmaceuticalInformationSequence EnergyWindowInformationSequence EnergyWindowRangeSequence
    DetectorInformationSequence RotationInformationSequence FrameAnatomySequence
    IrradiationEventIdentificationSequence MaskSubtractionSequence PhaseInformationSequence GatedInformationSequence
    DataInformationSequence TimeSlotInformationSequence RadiopharmaceuticalUsageSequence PETFrameAcquisitionSequence
    PETDetectorMotionDetailsSequence PETPositionSequence PETFrameCorrectionFactorsSequence PETReconstructionSequence
    PETTableDynamicsSequence RespiratorySynchronizationSequence SpecificAbsorptionRateSequence OperatingModeSequence
    MRImagingModifierSequence MRTransmitCoilSequence MultiCoilDefinitionSequence VelocityEncodingAcquisitionSequence
    MRArterialSpinLabelingSequence ASLSlabSequence"""
)

CODED = _tags(
    """AnatomicRegionSequence ViewCodeSequence ViewModifierCodeSequence PatientOrientationCodeSequence
    PatientOrientationModifierCodeSequence PatientGantryRelationshipCodeSequence RadionuclideCodeSequence
    PrimaryAnatomicStructureSequence AdministrationRouteCodeSequence RadiopharmaceuticalCodeSequence"""
)
"""Sequences of coded concepts, which must all have a `meaning`."""
_CONTEXT_GROUPS = (4, 11, 18, 19, 20, 21, 25, 26, 4009, 4010, 4011, 4012, 4014, 4015, 4016, 4018, 4019, 4020, 4021)
_BEFORE = {"51185008": "816094009", "113345001": "818981001", "12921003": "816092008"}
"""Chest, abdomen and pelvis had other codes in earlier editions."""


@cache
def meaning(value: str, scheme: str) -> str | None:
    """What a code stands for, in the words of PS3.16; None where it is in none of the context groups for `CODED`."""
    from pydicom.sr.coding import Code

    asked = Code(value, "SRT" if scheme in ("SNM3", "99SDM") else scheme, "")
    return next((code.meaning for code in _concepts() if code == asked), None)


@cache
def _concepts() -> list[Any]:
    from pydicom.sr.codedict import codes  # half a second

    groups = (getattr(codes, f"cid{number}") for number in _CONTEXT_GROUPS)
    known = [getattr(group, name) for group in groups for name in group.dir()]
    return known + [code._replace(value=old) for old, new in _BEFORE.items() for code in known if code.value == new]


def is_meaning(words: str) -> bool:
    """Whether this is what some code of `CODED` stands for."""
    return any(code.meaning.casefold() == words.casefold() for code in _concepts())


TABLES = _tags(
    """LUTData RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData"""
)
"""Binary values that are numbers; of every other kind of bytes nothing is kept."""

CODES = _tags(
    """ImageType FrameType Modality PhotometricInterpretation BodyPartExamined Laterality ImageLaterality
    FrameLaterality ViewPosition PatientPosition PatientOrientation PresentationIntentType PresentationLUTShape
    PixelIntensityRelationship LossyImageCompression LossyImageCompressionMethod VOILUTFunction ScanningSequence
    SequenceVariant ScanOptions MRAcquisitionType AngioFlag RotationDirection FilterType ExposureModulationType
    PixelPresentation VolumetricProperties VolumeBasedCalculationTechnique ComplexImageComponent AcquisitionContrast
    DiffusionDirectionality DiffusionAnisotropyType DimensionOrganizationType CorrectedImage SeriesType Units
    CountsSource DecayCorrection CollimatorType FieldOfViewShape DetectorType AcquisitionType ReconstructionAlgorithm
    ContentQualification PositionerType OrganExposed ResonantNucleus KSpaceFiltering ApplicableSafetyStandardAgency
    EchoPulseSequence MultipleSpinEcho MultiPlanarExcitation PhaseContrast TimeOfFlightContrast
    SteadyStatePulseSequence EchoPlanarPulseSequence SaturationRecovery SpectrallySelectedSuppression
    OversamplingPhase GeometryOfKSpaceTraversal RectilinearPhaseEncodeReordering SegmentedKSpaceTraversal
    CoverageOfKSpace InversionRecovery FlowCompensation FlowCompensationDirection Spoiling T2Preparation
    SpectrallySelectedExcitation SpatialPresaturation PartialFourier PartialFourierDirection ParallelAcquisition
    ParallelAcquisitionTechnique InPlanePhaseEncodingDirection QuadratureReceiveCoil ReceiveCoilType
    GradientOutputType FluoroscopyFlag ConstantVolumeFlag ConvolutionKernelGroup FilterMaterial
    CardiacSynchronizationTechnique CardiacSignalSource RespiratoryMotionCompensationTechnique
    RespiratorySignalSource BulkMotionCompensationTechnique AcquisitionTimeSynchronized SynchronizationTrigger
    AttenuationCorrected DecayCorrected ScatterCorrected RandomsCorrected DeadTimeCorrected GantryMotionCorrected
    PatientMotionCorrected CountLossNormalizationCorrected DetectorNormalizationCorrection
    NonUniformRadialSamplingCorrected SensitivityCalibrated TimeOfFlightInformationUsed TableMotion
    RadiationSetting RecommendedViewingMode MaskOperation ShutterShape CollimatorShape FieldOfViewHorizontalFlip
    TypeOfDetectorMotion ReprojectionMethod RandomsCorrectionMethod AttenuationCorrectionSource
    AttenuationCorrectionTemporalRelationship AcquisitionStartCondition AcquisitionTerminationCondition
    ReconstructionType IterativeReconstructionMethod CardiacBeatRejectionTechnique CardiacFramingType
    RespiratoryTriggerType SpecificAbsorptionRateDefinition OperatingModeType OperatingMode MagnetizationTransfer
    BloodSignalNulling Tagging TransmitCoilType MultiCoilElementUsed DetectorGeometry SliceProgressionDirection
    ArterialSpinLabelingContrast ASLContext ASLCrusherFlag ASLBolusCutoffFlag"""
)
"""Code strings whose every value must be a word of `WORDS`."""

_WORDS = """
    ORIGINAL DERIVED PRIMARY SECONDARY AXIAL LOCALIZER SCOUT REFORMATTED MPR MIP MINIP AVERAGE PROJECTION IMAGE VOLUME
    NONE OTHER M P R I ND NORM DIS2D DIS3D FM FFE SE GR IR M_FFE M_SE M_IR P_FFE MFSPLIT DIFFUSION ADC TRACEW FA
    PERFUSION ANGIO TOF CSA MOSAIC HELIX CT_SOM5 CT_SOM7 SPI SPIRAL STATIC DYNAMIC GATED TOMO RECON EMISSION
    TRANSMISSION ADD WATER FAT IN_PHASE OUT_PHASE OPP_PHASE PHASE MAGNITUDE REAL IMAGINARY MIXED RESAMPLED FILTERED
    SUBTRACTION CPR PARALLEL T1 T2 T2_STAR PROTON_DENSITY FLOW_ENCODED FLUID_ATTENUATED STIR UNKNOWN TAGGING TI
    VELOCITY TEMPERATURE CT MR PT CR DX MG IO US XA RF NM OT PX RG BI BMD BDUS IVUS DG ES LS TG XC AS CD CF DD DF DS EC
    MA MS ST VF MONOCHROME1 MONOCHROME2 RGB PALETTE_COLOR YBR_FULL
    YBR_FULL_422 YBR_RCT YBR_ICT MONOCHROME COLOR HEAD SKULL BRAIN NECK CHEST THORAX ABDOMEN PELVIS SPINE CSPINE
    TSPINE LSPINE SSPINE HIP KNEE ANKLE FOOT HAND WRIST ELBOW SHOULDER ARM FOREARM LEG FEMUR EXTREMITY BREAST HEART
    LIVER LUNG KIDNEY PROSTATE PANCREAS UTERUS BLADDER COLON AORTA CLAVICLE FINGER TOE HUMERUS RIB STERNUM MANDIBLE
    MAXILLA JAW EYE EAR NOSE ORBIT WHOLEBODY L U B AP PA LL RL RLD LLD RLO LLO LAO RAO LPO RPO LATERAL OBLIQUE CC
    MLO ML LM LMO FB SIO XCCL XCCM HFS HFP HFDR HFDL FFS FFP FFDR FFDL SITTING LFS LFP RFS RFP FOR_PRESENTATION
    FOR_PROCESSING IDENTITY INVERSE LIN LOG DISP LINEAR LINEAR_EXACT SIGMOID 00 01 ISO_10918_1 ISO_14495_1
    ISO_15444_1 ISO_15444_2 ISO_15444_15 EP RM SK MTC SS TRSS SP MP OSP 2D 3D PER RG CG PPG FC PFF PFP FS Y N CW
    STRIP WEDGE BUTTERFLY MULTIPLE FLAT CONSTANT_ANGLE STATIONARY FREE SEQUENCED FILTER_BACK_PROJ ITERATIVE HELICAL
    AXIAL_MODE SAMPLED DISTORTED MAX_IP MIN_IP VOLUME_RENDER SURFACE_RENDER MULTIPLANAR_REFORMATTED DIRECTIONAL
    BMATRIX ISOTROPIC FRACTIONAL RELATIVE VOLUME_RATIO 3D_TEMPORAL TILED_FULL TILED_SPARSE DECY ATTN SCAT DTIM MOTN
    PMOT CLN RAN RADL DCAL BQML CNTS CPS GML PROPCNTS PROPCPS CM2 CM2ML PCNT MGMINML UMOLMINML MLMING MLG 1CM UMOLML
    MLMINML MLML STDDEV UMOLMIN START ADMIN WHOLE_BODY WHOLE BODY
    GATED_TOMO RECON_TOMO RECON_GATED_TOMO
    RECTANGLE ROUND HEXAGONAL DIRECT SCINTILLATOR STORAGE FILM PRODUCT RESEARCH SERVICE PARA PINH FANB CONE SLNT
    ASTG DIVG YES NO CARM COLUMN MAMMOGRAPHIC PANORAMIC CEPHALOSTAT RIGID
    1H 3HE 7LI 13C 19F 23NA 31P 129XE COSINE COSINE_SQUARED FERMI GAUSSIAN HAMMING HANNING LORENTZIAN LRNTZ_GSS_TFM
    RIESZ TUKEY USER_DEFINED IEC FDA
    SPIN GRADIENT BOTH FREE_PRECESSION TRANSVERSE TIME_REVERSED LONGITUDINAL FAT_AND_WATER SILICON_GEL 2D_3D
    RECTILINEAR RADIAL CENTRIC SEGMENTED REVERSE_LINEAR REVERSE_CENTRIC SINGLE PARTIAL FULL CYLINDRICAL ELLIPSOIDAL
    WEIGHTED ACCELERATION FREQUENCY SLICE_SELECT SLICE_AND_FREQ SLICE_FREQ_PHASE PHASE_AND_FREQ SLICE_AND_PHASE
    RF_AND_GRADIENT SLAB COMBINATION PILS SENSE SMASH ROW SURFACE MULTICOIL DB_DT ELECTRIC_FIELD PER_NERVE_STIM
    SOFT_TISSUE BONE COPPER ALUMINUM MOLYBDENUM RHODIUM NIOBIUM LEAD TIN SILVER
    REALTIME PROSPECTIVE RETROSPECTIVE PACED ECG VCG PP BREATH_HOLD GATING TRACKING PHASE_ORDERING PHASE_SCAN
    CORRECTION BELT NASAL_PROBE CO2_SENSOR NAVIGATOR MR_PHASE SPIROMETER EXTERNAL_MARKER INTERNAL_MARKER
    SOURCE EXTERNAL PASSTHRU NO_TRIGGER
    SINGLE_PLANE BIPLANE_A BIPLANE_B SC GR SUB NAT AVG_SUB TID REV_TID RECTANGULAR CIRCULAR POLYGONAL
    STEP_AND_SHOOT CONTINUOUS ROCKING CC REPROJECTION SUM MAX_PIXEL DLYD SING RING TRUE FALSE POSITRON_SOURCE
    SINGLE_PHOTON CALCULATED CONCURRENT SEPARATE SIMULTANEOUS DENS RDD MANU AUTO OVFL TIME TRIG MLEM OSEM RAMLA
    ANGULAR LONGITUDINAL ECG_BASED ORGAN_BASED RR_INTERVAL QRS_LENGTH PVC FORW BACK PCNT AMPLITUDE IEC_WHOLE_BODY
    IEC_PARTIAL_BODY IEC_HEAD IEC_LOCAL STATIC_FIELD RF GRADIENT IEC_NORMAL IEC_FIRST_LEVEL IEC_SECOND_LEVEL
    ON_RESONANCE OFF_RESONANCE GRID LINE CYLINDRICAL_RING CYL_RING_PARTIAL MULTIPLE_PLANAR MUL_PLAN_PART_RING
    APEX_TO_BASE BASE_TO_APEX LABEL CONTROL M_ZERO_SCAN PSEUDOCONTINUOUS PULSED
"""
WORDS = frozenset(_WORDS.split())
_ORIENTATION = re.compile(r"[LRAPHF]{1,3}")

_UNITS = re.compile(r"HU|US|OD|HU_MOD|PCT|MGML|Z_EFF|ED|EDW|BQML|NORMALIZED", re.IGNORECASE)

TEXTS: dict[int, re.Pattern[str]] = {
    0x00080070: re.compile(
        r"(?:GE|GE MEDICAL SYSTEMS|GE HEALTHCARE|SIEMENS|SIEMENS HEALTHINEERS|SIEMENS HEALTHCARE|PHILIPS"
        r"|PHILIPS MEDICAL SYSTEMS|PHILIPS HEALTHCARE|CANON|CANON_MEC|CANON MEDICAL SYSTEMS|TOSHIBA|TOSHIBA_MEC|HITACHI"
        r"|HOLOGIC|HOLOGIC, INC\.|FUJIFILM|FUJI PHOTO FILM CO\., LTD\.|AGFA|CARESTREAM|CARESTREAM HEALTH|KODAK"
        r"|SAMSUNG|SAMSUNG ELECTRONICS|MINDRAY|ESAOTE|UIH|UNITED IMAGING|NEUSOFT|SHIMADZU|KONICA MINOLTA|VARIAN)",
        re.IGNORECASE,
    ),  # Manufacturer
    0x00181210: re.compile(
        r"(?:[A-Za-z]{1,2}\d{2,3}[a-z]?|\d|STANDARD|BONE|BONEPLUS|LUNG|DETAIL|EDGE|SOFT|CHEST|FC\d{2}|[A-Z])", re.ASCII
    ),  # Convolution Kernel
    0x00209056: re.compile(r"\d{1,3}", re.ASCII),  # Stack ID
    0x00281054: _UNITS,  # Rescale Type
    0x00283004: _UNITS,  # Modality LUT Type
}
"""Text whose every value must match."""

APART = _tags("SequenceName ConvolutionKernel StackID RescaleType ModalityLUTType")
"""Text by which the reader tells images apart: a value that `TEXTS` does not know becomes a token, equal for equal."""


def is_word(value: str, tag: int) -> bool:
    """Whether this code string is of the vocabulary."""
    if tag == 0x00200020:
        return _ORIENTATION.fullmatch(value) is not None
    return value.replace(" ", "_") in WORDS or value in WORDS


IMAGE_TYPES = _tags("ImageType FrameType")
"""Their values have places; a word that is not known becomes OTHER and a token."""

DATES = _tags(
    """StudyDate SeriesDate AcquisitionDate ContentDate StudyTime SeriesTime AcquisitionTime ContentTime
    AcquisitionDateTime FrameAcquisitionDateTime FrameReferenceDateTime RadiopharmaceuticalStartTime
    RadiopharmaceuticalStopTime RadiopharmaceuticalStartDateTime RadiopharmaceuticalStopDateTime"""
)
"""Kept by the options for longitudinal temporal information; no other date or time ever is."""

EMPTIED = _tags(
    """PositionReferenceIndicator AcquisitionContextSequence AnatomicRegionSequence PositionerType ScanOptions
    RecommendedViewingMode TableMotion PositionerMotion"""
)
EMPTIED_IN_GROUPS = _tags(
    """DerivationImageSequence ReferencedImageSequence MRSpatialSaturationSequence ReceiveCoilManufacturerName
    TransmitCoilManufacturerName"""
)
EMPTIED_IN_NUCLEAR = _tags(
    """PatientOrientationCodeSequence PatientGantryRelationshipCodeSequence RadionuclideCodeSequence BeatRejectionFlag
    ReprojectionMethod"""
)
"""Of type 2 (PS3.5, 7.4.3): without a value where theirs may not stay; anywhere, in functional groups, in NM and PET"""

FILLED_IN_ENHANCED = _tags(
    """ContentDate ContentTime AcquisitionDateTime DeviceSerialNumber Manufacturer ManufacturerModelName
    SoftwareVersions PulseSequenceName ReceiveCoilName TransmitCoilName MultiCoilElementName ImageFilter
    RadiopharmaceuticalStartDateTime ScatterCorrectionMethod ASLTechniqueDescription"""
)
FILLED_IN_PET = _tags("SeriesDate SeriesTime")
"""Of type 1 there: never without a value, so with a dummy where theirs may not stay."""

CHARACTERISTICS = _tags("PatientSex PatientAge PatientSize PatientWeight")
"""Kept by the Retain Patient Characteristics Option, which would allow more."""
