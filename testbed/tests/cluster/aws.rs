use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ecr::config::{Credentials, ProvideCredentials as _, SharedCredentialsProvider};
use aws_sdk_ecr::error::{DisplayErrorContext, ProvideErrorMetadata as _};
use base64::Engine as _;
use testbed::aws::{AwsStandIn, Fault, Operation, REGION, Scope, TOKEN_PREFIX};
use testbed::controlplane::ControlPlane;

use crate::shared;

const BASE: &str = "arn:aws:iam::111111111111:role/base";
const OTHER: &str = "arn:aws:iam::222222222222:role/path/other";
const LIMIT: Duration = Duration::from_secs(10);

/// A stand-in with two roles, and a service account that the first one trusts.
struct Bed {
    control_plane: &'static ControlPlane,
    aws: AwsStandIn,
    namespace: String,
}

impl Bed {
    async fn new() -> Result<Self> {
        let control_plane = shared().await?;
        let namespace = control_plane.namespace("aws", &[]).await?;
        let aws = AwsStandIn::start(control_plane.issuer())?;
        aws.role(BASE).trusts_subject(&format!("system:serviceaccount:{namespace}:default"));
        aws.role(OTHER).trusts_role(BASE).external_id("secret handshake");
        Ok(Self { control_plane, aws, namespace })
    }

    async fn token_file(&self, account: &str, audience: &str) -> Result<PathBuf> {
        let token = self
            .control_plane
            .service_account_token(&self.namespace, account, audience, 2 * 60 * LIMIT)
            .await?;
        let path = self.control_plane.dir().join(format!("{}.{account}.token", self.namespace));
        std::fs::write(&path, token)?;
        Ok(path)
    }

    /// Without credentials and without retries, so that each call is one request.
    async fn anonymous(&self) -> SdkConfig {
        aws_config::defaults(BehaviorVersion::latest())
            .no_credentials()
            .retry_config(aws_config::retry::RetryConfig::disabled())
            .endpoint_url(self.aws.url())
            .region(REGION)
            .load()
            .await
    }

    /// With credentials of the first role.
    async fn base(&self) -> Result<SdkConfig> {
        let issued = self.aws.issue_credentials(BASE, Duration::from_secs(3600))?;
        let credentials = Credentials::new(
            issued.access_key_id,
            issued.secret_access_key,
            Some(issued.session_token),
            Some(issued.expires_at),
            "test",
        );
        let anonymous = self.anonymous().await.into_builder();
        Ok(anonymous.credentials_provider(SharedCredentialsProvider::new(credentials)).build())
    }

    /// Presents a service account's token to STS.
    async fn exchange(&self, account: &str, audience: &str, role: &str) -> Result<Result<(), String>> {
        let token = std::fs::read_to_string(self.token_file(account, audience).await?)?;
        let sts = aws_sdk_sts::Client::new(&self.anonymous().await);
        let call = sts.assume_role_with_web_identity().role_arn(role).role_session_name("test");
        let result = call.web_identity_token(token).send().await;
        Ok(result.map(drop).map_err(|error| error.code().unwrap_or("no code").to_owned()))
    }
}

fn password(
    answer: &aws_sdk_ecr::operation::get_authorization_token::GetAuthorizationTokenOutput,
) -> Result<String> {
    let encoded = answer
        .authorization_data()
        .first()
        .and_then(|data| data.authorization_token())
        .context("no token")?;
    let decoded = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(encoded)?)?;
    Ok(decoded.strip_prefix("AWS:").context("no user AWS")?.to_owned())
}

/// The code of the error that ECR answers with, if it is one that the SDK understands.
async fn ecr_error(config: &SdkConfig) -> String {
    match aws_sdk_ecr::Client::new(config).get_authorization_token().send().await {
        Ok(_) => "OK".into(),
        Err(error) => error.code().map_or_else(|| DisplayErrorContext(&error).to_string(), str::to_owned),
    }
}

/// Set for the copy of the next test that plays the operator.
const OPERATOR: &str = "TESTBED_TEST_OPERATOR";

#[tokio::test]
async fn the_environment_alone_leads_from_a_service_account_to_a_token() -> Result<()> {
    if std::env::var_os(OPERATOR).is_some() {
        let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
        let answer = aws_sdk_ecr::Client::new(&config).get_authorization_token().send().await?;
        println!("\npassword={}", password(&answer)?);
        return Ok(());
    }

    let bed = Bed::new().await?;
    let file = bed.token_file("default", "sts.amazonaws.com").await?;
    let operator = tokio::process::Command::new(std::env::current_exe()?)
        .args([
            "--exact",
            "--nocapture",
            "aws::the_environment_alone_leads_from_a_service_account_to_a_token",
        ])
        .env(OPERATOR, "yes")
        .envs(bed.aws.env_web_identity(BASE, &file))
        .output()
        .await?;
    let printed = String::from_utf8(operator.stdout)?;
    let token =
        printed.lines().find_map(|line| line.strip_prefix("password=")).with_context(|| printed.clone())?;

    assert!(token.starts_with(TOKEN_PREFIX) && token.len() > 40, "{token}");
    assert_eq!(bed.aws.current_token(BASE, REGION).as_deref(), Some(token));
    assert!(bed.aws.is_valid(token));
    assert_eq!(bed.aws.count(&Scope::of(Operation::AssumeRoleWithWebIdentity).role(BASE)), 1);
    assert_eq!(bed.aws.count(&Scope::of(Operation::GetAuthorizationToken).role(BASE).region(REGION)), 1);
    assert_eq!(bed.aws.count(&Scope::all()), 2);
    Ok(())
}

#[tokio::test]
async fn sts_takes_only_tokens_for_it_of_whom_the_role_trusts() -> Result<()> {
    let bed = Bed::new().await?;
    bed.control_plane.service_account(&bed.namespace, "stranger").await?;
    let sts = "sts.amazonaws.com";

    assert_eq!(bed.exchange("default", sts, BASE).await?, Ok(()));
    assert_eq!(
        bed.exchange("default", "https://example.com", BASE).await?,
        Err("InvalidIdentityToken".into())
    );
    assert_eq!(bed.exchange("stranger", sts, BASE).await?, Err("AccessDenied".into()));
    assert_eq!(bed.exchange("default", sts, OTHER).await?, Err("AccessDenied".into()));
    assert_eq!(bed.exchange("default", sts, "arn:aws:iam::1:role/none").await?, Err("AccessDenied".into()));

    let foreign = aws_sdk_sts::Client::new(&bed.anonymous().await);
    let call = foreign.assume_role_with_web_identity().role_arn(BASE).role_session_name("test");
    let error = call.web_identity_token("no token at all").send().await.expect_err("nonsense");
    assert_eq!(error.code(), Some("InvalidIdentityToken"));
    assert_eq!(bed.aws.count(&Scope::of(Operation::AssumeRoleWithWebIdentity).role(BASE)), 4);
    Ok(())
}

#[tokio::test]
async fn one_role_assumes_another_with_the_external_id_only() -> Result<()> {
    let bed = Bed::new().await?;
    let base = bed.base().await?;
    let assume = |external_id: Option<&str>, role: &str| {
        let call = aws_sdk_sts::Client::new(&base).assume_role().role_arn(role).role_session_name("test");
        call.set_external_id(external_id.map(str::to_owned)).send()
    };
    for wrong in [None, Some("guess")] {
        let error = assume(wrong, OTHER).await.expect_err("the external ID is wrong");
        assert_eq!(error.code(), Some("AccessDenied"));
    }
    let error = assume(Some("secret handshake"), BASE).await.expect_err("it does not trust itself");
    assert_eq!(error.code(), Some("AccessDenied"));
    let error = aws_sdk_sts::Client::new(&bed.anonymous().await)
        .assume_role()
        .role_arn(OTHER)
        .role_session_name("test")
        .send()
        .await
        .expect_err("nobody");
    assert!(error.code().is_none_or(|code| code == "MissingAuthenticationToken"), "{error:?}");

    // The way that an operator takes: a provider over the first credentials.
    let provider = aws_config::sts::AssumeRoleProvider::builder(OTHER)
        .external_id("secret handshake")
        .session_name("test")
        .region(Region::new("eu-central-1"))
        .configure(&base)
        .build()
        .await;
    let credentials = provider.provide_credentials().await?;
    let expiry = credentials.expiry().context("no expiry")?.duration_since(SystemTime::now())?;
    assert!(expiry > Duration::from_secs(3000) && expiry <= Duration::from_secs(3600), "{expiry:?}");

    let config = base
        .into_builder()
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .region(Region::new("eu-central-1"))
        .build();
    let answer = aws_sdk_ecr::Client::new(&config).get_authorization_token().send().await?;
    let data = answer.authorization_data().first().context("no token")?;
    assert_eq!(data.proxy_endpoint(), Some("https://222222222222.dkr.ecr.eu-central-1.amazonaws.com"));
    let token = password(&answer)?;
    assert_eq!(bed.aws.current_token(OTHER, "eu-central-1"), Some(token));
    assert_eq!(bed.aws.current_token(OTHER, REGION), None);
    assert_eq!(bed.aws.current_token(BASE, "eu-central-1"), None);
    Ok(())
}

#[tokio::test]
async fn tokens_and_credentials_expire() -> Result<()> {
    let bed = Bed::new().await?;
    let base = bed.base().await?;
    let ecr = aws_sdk_ecr::Client::new(&base);

    let answer = ecr.get_authorization_token().send().await?;
    let expires =
        answer.authorization_data().first().and_then(|data| data.expires_at()).context("no expiry")?;
    let twelve_hours = SystemTime::now() + Duration::from_secs(12 * 60 * 60);
    let off = twelve_hours.duration_since(SystemTime::try_from(*expires)?)?;
    assert!(off < Duration::from_secs(60), "{off:?}");
    assert!(bed.aws.is_valid(&password(&answer)?));

    bed.aws.set_token_lifetime(Duration::ZERO);
    let short = password(&ecr.get_authorization_token().send().await?)?;
    assert!(!bed.aws.is_valid(&short));
    assert_eq!(bed.aws.all_tokens().len(), 2);
    assert_eq!(bed.aws.current_token(BASE, REGION), Some(password(&answer)?));

    let expired = bed.aws.issue_credentials(BASE, Duration::ZERO)?;
    let (key, secret) = (expired.access_key_id, expired.secret_access_key);
    let expired = Credentials::new(key, secret, Some(expired.session_token), None, "test");
    let unknown = Credentials::new("ASIA0000", "secret", Some("session".into()), None, "test");
    for (credentials, code) in [(expired, "ExpiredTokenException"), (unknown, "UnrecognizedClientException")]
    {
        let provider = SharedCredentialsProvider::new(credentials);
        let config = bed.anonymous().await.into_builder().credentials_provider(provider).build();
        assert_eq!(ecr_error(&config).await, code);
    }
    Ok(())
}

#[tokio::test]
async fn faults_look_as_they_do_at_aws() -> Result<()> {
    let bed = Bed::new().await?;
    let base = bed.base().await?;

    for (fault, code) in [
        (Fault::Throttle, "ThrottlingException"),
        (Fault::ServerError, "ServerException"),
        (Fault::AccessDenied, "AccessDeniedException"),
    ] {
        bed.aws.inject(fault, Scope::of(Operation::GetAuthorizationToken).role(BASE).region(REGION));
        assert_eq!(ecr_error(&base).await, code);
        // In another region nothing is wrong.
        let elsewhere = base.clone().into_builder().region(Region::new("us-west-2")).build();
        assert_eq!(ecr_error(&elsewhere).await, "OK");
    }

    bed.aws.inject(Fault::Throttle, Scope::of(Operation::AssumeRoleWithWebIdentity));
    assert_eq!(bed.exchange("default", "sts.amazonaws.com", BASE).await?, Err("Throttling".into()));

    bed.aws.heal();
    assert_eq!(ecr_error(&base).await, "OK");
    assert_eq!(bed.exchange("default", "sts.amazonaws.com", BASE).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn what_is_no_answer_is_an_error() -> Result<()> {
    let bed = Bed::new().await?;
    let base = bed.base().await?;
    for fault in [Fault::MalformedBody, Fault::HugeBody, Fault::CloseConnection] {
        bed.aws.inject(fault, Scope::all());
        let error = ecr_error(&base).await;
        assert_ne!(error, "OK", "{fault:?}");
        assert!(bed.aws.calls().last().is_some_and(|call| call.answer == format!("{fault:?}")));
    }

    bed.aws.inject(Fault::Hang, Scope::all());
    let config = base.clone();
    let hanging = tokio::spawn(async move { ecr_error(&config).await });
    let hangs = |call: &testbed::aws::Call| call.answer == "Hang";
    bed.aws.wait_for(|state| state.calls().iter().any(hangs), LIMIT).await?;
    assert!(!hanging.is_finished());
    hanging.abort();

    bed.aws.heal();
    assert_eq!(ecr_error(&base).await, "OK");
    Ok(())
}

#[tokio::test]
async fn tokens_can_be_useless() -> Result<()> {
    let bed = Bed::new().await?;
    let ecr = aws_sdk_ecr::Client::new(&bed.base().await?);

    bed.aws.inject(Fault::ExpiredToken, Scope::all());
    let answer = ecr.get_authorization_token().send().await?;
    let expires =
        answer.authorization_data().first().and_then(|data| data.expires_at()).context("no expiry")?;
    assert!(SystemTime::try_from(*expires)? < SystemTime::now());
    assert!(!bed.aws.is_valid(&password(&answer)?));

    bed.aws.inject(Fault::EmptyToken, Scope::all());
    assert_eq!(password(&ecr.get_authorization_token().send().await?)?, "");

    bed.aws.inject(Fault::NoToken, Scope::all());
    assert!(ecr.get_authorization_token().send().await?.authorization_data().is_empty());
    Ok(())
}

#[tokio::test]
async fn waiting_in_vain_tells_what_happened() -> Result<()> {
    let bed = Bed::new().await?;
    ecr_error(&bed.base().await?).await;
    let error = bed.aws.wait_for(|state| state.count(&Scope::all()) > 1, Duration::from_millis(50)).await;
    let message = error.expect_err("only one call was made").to_string();
    assert!(message.contains("GetAuthorizationToken") && message.contains(BASE), "{message}");
    assert!(!message.contains(TOKEN_PREFIX), "{message}");
    Ok(())
}
